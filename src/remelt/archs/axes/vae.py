"""The axis groups of the autoencoder of latent diffusion, of any width and depth."""

from __future__ import annotations

from remelt.archs.axes.convolutions import normalise, pin, pin_made, read, rows
from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axis_groups import AxisGroup, Shapes

USUAL: Heads = {"vae": HeadRule(count=1)}


def vae_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """A file of an autoencoder alone."""
    drafts = Drafts(shapes)
    autoencoder(drafts, ("autoencoder.", "first_stage_model.", ""), {**USUAL, **heads}["vae"])
    return drafts.finished()


def autoencoder(drafts: Drafts, roots: tuple[str, ...], heads: HeadRule, name: str = "vae") -> None:
    """The encoder, the decoder, or both, below the first of ``roots`` that has either."""
    for root in roots:
        halves = [half for half in ("encoder", "decoder") if f"{root}{half}.conv_in.weight" in drafts.shapes]
        for half in halves:
            one = _Half(drafts, f"{root}{half}.", f"{name}.{half}", heads)
            one.encode(f"{root}quant_conv") if half == "encoder" else one.decode(f"{root}post_quant_conv")
        if halves:
            return


class _Half:
    """An encoder or a decoder. A stream begins at its first convolution, wherever sizes change, and at a shortcut."""

    def __init__(self, drafts: Drafts, root: str, name: str, heads: HeadRule) -> None:
        self.drafts, self.root, self.name, self.heads = drafts, root, name, heads
        self.stream = self._begin("conv_in")

    def encode(self, quantiser: str) -> None:
        """Pixels to the moments of latents."""
        pin(self.drafts, f"{self.name}.pixels", f"{self.root}conv_in.weight", 1)
        level = 0
        while self._has(f"down.{level}."):
            self._blocks(f"down.{level}")
            if f"{self.root}down.{level}.downsample.conv.weight" in self.drafts.shapes:
                self._resample(f"down.{level}.downsample.conv")
            level += 1
        self._middle()
        self._end(quantiser)

    def decode(self, quantiser: str) -> None:
        """Latents to pixels, from the last of the levels up."""
        latents = f"{self.root}conv_in"
        if f"{quantiser}.weight" in self.drafts.shapes:
            pin(self.drafts, f"{self.name}.latents", f"{quantiser}.weight", 1)
            self.drafts.free(f"{self.name}.quantised", rows(self.drafts, quantiser)).made_by(quantiser).read_by(latents)
        else:
            pin(self.drafts, f"{self.name}.latents", f"{latents}.weight", 1)
        self._middle()
        level = 0
        while self._has(f"up.{level}."):
            level += 1
        for number in reversed(range(level)):
            self._blocks(f"up.{number}")
            if f"{self.root}up.{number}.upsample.conv.weight" in self.drafts.shapes:
                self._resample(f"up.{number}.upsample.conv")
        self._end("")

    def _has(self, start: str) -> bool:
        return any(key.startswith(f"{self.root}{start}") for key in self.drafts.shapes)

    def _begin(self, module: str) -> Draft:
        whole = f"{self.root}{module}"
        return self.drafts.free(f"{self.name}.{module}", rows(self.drafts, whole)).made_by(whole)

    def _resample(self, module: str) -> None:
        self.stream.read_by(f"{self.root}{module}")
        self.stream = self._begin(module)

    def _middle(self) -> None:
        self._block("mid.block_1")
        self._attention("mid.attn_1")
        self._block("mid.block_2")

    def _blocks(self, level: str) -> None:
        """The blocks of one level, each with an attention after it where it has one."""
        number = 0
        while f"{self.root}{level}.block.{number}.conv1.weight" in self.drafts.shapes:
            self._block(f"{level}.block.{number}")
            if f"{self.root}{level}.attn.{number}.q.weight" in self.drafts.shapes:
                self._attention(f"{level}.attn.{number}")
            number += 1

    def _block(self, block: str) -> None:
        module = f"{self.root}{block}"
        inner = self.drafts.free(f"{self.name}.{block}.inner", rows(self.drafts, f"{module}.conv1"))
        normalise([self.stream], f"{module}.norm1")
        self.stream.read_by(f"{module}.conv1")
        inner.made_by(f"{module}.conv1").read_by(f"{module}.conv2")
        normalise([inner], f"{module}.norm2")
        if f"{module}.nin_shortcut.weight" in self.drafts.shapes:
            self.stream.read_by(f"{module}.nin_shortcut")
            self.stream = self._begin(f"{block}.nin_shortcut")
        self.stream.made_by(f"{module}.conv2")

    def _attention(self, block: str) -> None:
        module = f"{self.root}{block}"
        width = rows(self.drafts, f"{module}.q")
        count = self.heads.heads(width)
        attention = self.drafts.attention(f"{self.name}.{block}", count, width // count)
        normalise([self.stream], f"{module}.norm")
        for projection, level in (("q", QK), ("k", QK), ("v", VALUE)):
            read([self.stream], f"{module}.{projection}")
            attention.made_by(f"{module}.{projection}", (HEAD, level))
        attention.read_by(f"{module}.proj_out", (HEAD, VALUE))
        self.stream.made_by(f"{module}.proj_out")

    def _end(self, quantiser: str) -> None:
        """The last norm and convolution. What they make may be mixed once more, by a convolution of one pixel."""
        last = f"{self.root}conv_out"
        normalise([self.stream], f"{self.root}norm_out")
        self.stream.read_by(last)
        if f"{quantiser}.weight" in self.drafts.shapes:
            self.drafts.free(f"{self.name}.moments", rows(self.drafts, last)).made_by(last).read_by(quantiser)
            last = quantiser
        pin_made(self.drafts, f"{self.name}.made", last)
