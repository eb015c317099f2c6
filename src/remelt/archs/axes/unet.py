"""The axis groups of the U-Net of latent diffusion, of any width and depth: a walk along the keys that are there.

Residual blocks and transformers continue a stream. A new one begins at the first convolution, where sizes change, and
where a residual block has a convolution around it. An output block reads two streams, the second from the stack.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from remelt.archs.axes.convolutions import Signal, normalise, pin, pin_made, read, rows, told
from remelt.archs.axes.draft import HEAD, QK, VALUE, Draft, Drafts
from remelt.archs.axes.heads import HeadRule
from remelt.errors import RefusedError

FIRST = "input_blocks.0.0.weight"
_BLOCK = re.compile(r"((?:input_blocks|output_blocks)\.\d+|middle_block)\.(\d+)\.")


class UNet:
    """The U-Net below ``root``, with a head rule for all of its attentions.

    ``context`` are streams that its cross-attention reads, with their places there, ``pooled`` those that its label
    embedding reads: text encoders in the same file. What they leave comes from elsewhere, and is fixed.
    """

    def __init__(
        self,
        drafts: Drafts,
        root: str,
        heads: HeadRule,
        context: Sequence[tuple[Draft, int]] = (),
        pooled: Sequence[tuple[Draft, int]] = (),
        name: str = "unet",
    ) -> None:
        self.drafts, self.root, self.name, self.heads = drafts, root, name, heads
        self.context = told(drafts, f"{name}.context", context_width(drafts, root), context)
        self.time = self._times(pooled)
        self._walk()

    def _times(self, pooled: Sequence[tuple[Draft, int]]) -> Draft:
        """The embedding of the time step, and of labels that are added to it."""
        time = self.drafts.free(f"{self.name}.time", rows(self.drafts, f"{self.root}time_embed.2"))
        for embedding in ("time_embed", "label_emb.0"):
            first, last = f"{self.root}{embedding}.0", f"{self.root}{embedding}.2"
            if f"{first}.weight" not in self.drafts.shapes:
                continue
            hidden = self.drafts.free(f"{self.name}.{embedding}.hidden", rows(self.drafts, first))
            hidden.made_by(first).read_by(last)
            time.made_by(last)
            width = self.drafts.shapes[f"{first}.weight"][1]
            read(told(self.drafts, f"{self.name}.{embedding}", width, pooled if "label" in embedding else ()), first)
        return time

    def _walk(self) -> None:
        first, last = f"{self.root}input_blocks.0.0", f"{self.root}out.2"
        pin(self.drafts, f"{self.name}.latents", f"{first}.weight", 1)
        signal: Signal = [self._begin("input_blocks.0.0")]
        skips = [signal[0]]
        for block, children in _blocks(self.drafts, self.root):
            for place, child in enumerate(children):
                if block.startswith("output_blocks") and place == 0 and self._is_residual(f"{block}.{child}"):
                    if not skips:
                        raise RefusedError(
                            f"{self.root}{block} has no input block to read",
                            hint="align whole models, or whole parts of them",
                        )
                    signal = [*signal, skips.pop()]
                signal = [self._module(f"{block}.{child}", signal)]
            if block.startswith("input_blocks"):
                skips.append(signal[0])
        normalise(signal, f"{self.root}out.0")
        read(signal, last)
        pin_made(self.drafts, f"{self.name}.made", last)

    def _is_residual(self, module: str) -> bool:
        return f"{self.root}{module}.in_layers.2.weight" in self.drafts.shapes

    def _begin(self, module: str, maker: str = "") -> Draft:
        made = f"{self.root}{maker or module}"
        return self.drafts.free(f"{self.name}.{module}", rows(self.drafts, made)).made_by(made)

    def _module(self, module: str, signal: Signal) -> Draft:
        """One module of a block, by what it has; the stream that comes out of it."""
        if self._is_residual(module):
            return self._residual(module, signal)
        (stream,) = signal
        for resampled in (f"{module}.op", f"{module}.conv"):
            if f"{self.root}{resampled}.weight" in self.drafts.shapes:
                stream.read_by(f"{self.root}{resampled}")
                return self._begin(resampled)
        self._transformer(module, stream)
        return stream

    def _residual(self, module: str, signal: Signal) -> Draft:
        whole = f"{self.root}{module}"
        first, last = f"{whole}.in_layers.2", f"{whole}.out_layers.3"
        normalise(signal, f"{whole}.in_layers.0")
        read(signal, first)
        inner = self.drafts.free(f"{self.name}.{module}.inner", rows(self.drafts, first)).made_by(first).read_by(last)
        embedded = f"{whole}.emb_layers.1"
        for offset in range(0, rows(self.drafts, embedded), inner.size):  # a scale has as many rows as a shift
            inner.made_by(embedded, offset=offset)
        self.time.read_by(embedded)
        normalise([inner], f"{whole}.out_layers.0")
        shortcut = f"{module}.skip_connection"
        if f"{self.root}{shortcut}.weight" in self.drafts.shapes:
            read(signal, f"{self.root}{shortcut}")
            return self._begin(shortcut).made_by(last)
        (stream,) = signal
        return stream.made_by(last)

    def _transformer(self, module: str, stream: Draft) -> None:
        whole = f"{self.root}{module}"
        normalise([stream], f"{whole}.norm")
        stream.read_by(f"{whole}.proj_in").made_by(f"{whole}.proj_out")
        inner = self._begin(module, f"{module}.proj_in").read_by(f"{whole}.proj_out")
        depth = 0
        while f"{whole}.transformer_blocks.{depth}.norm1.weight" in self.drafts.shapes:
            block = f"{module}.transformer_blocks.{depth}"
            for norm in ("norm1", "norm2", "norm3"):
                inner.normalised_by(f"{self.root}{block}.{norm}")
            self._attention(f"{block}.attn1", inner, crosses=False)
            self._attention(f"{block}.attn2", inner, crosses=True)
            self._feed_forward(f"{block}.ff", inner)
            depth += 1

    def _attention(self, module: str, inner: Draft, *, crosses: bool) -> None:
        whole = f"{self.root}{module}"
        width = rows(self.drafts, f"{whole}.to_q")
        heads = self.heads.heads(width)
        attention = self.drafts.attention(f"{self.name}.{module}", heads, width // heads)
        for projection, level in (("to_q", QK), ("to_k", QK), ("to_v", VALUE)):
            attention.made_by(f"{whole}.{projection}", (HEAD, level))
            if not crosses or projection == "to_q":
                inner.read_by(f"{whole}.{projection}")
            else:
                read(self.context, f"{whole}.{projection}")
        attention.read_by(f"{whole}.to_out.0", (HEAD, VALUE))
        inner.made_by(f"{whole}.to_out.0")

    def _feed_forward(self, module: str, inner: Draft) -> None:
        """Gated: both halves of what the first map makes belong to one hidden channel."""
        first, last = f"{self.root}{module}.net.0.proj", f"{self.root}{module}.net.2"
        half = rows(self.drafts, first) // 2
        hidden = self.drafts.free(f"{self.name}.{module}", half).made_by(first).made_by(first, offset=half)
        hidden.read_by(last)
        inner.read_by(first).made_by(last)


def context_width(drafts: Drafts, root: str) -> int:
    """How many channels the cross-attention of a U-Net reads."""
    keys = (key for key in drafts.shapes if key.startswith(root) and key.endswith(".attn2.to_k.weight"))
    return next((drafts.shapes[key][1] for key in keys), 0)


def _blocks(drafts: Drafts, root: str) -> Iterator[tuple[str, list[int]]]:
    """The blocks after the first, in the order in which they run, with the numbers of their modules."""
    found: dict[str, set[int]] = defaultdict(set)
    for key in drafts.shapes:
        matched = _BLOCK.match(key, len(root)) if key.startswith(root) else None
        if matched is not None:
            found[matched[1]].add(int(matched[2]))
    stages = ("input_blocks", "middle_block", "output_blocks")
    for stage in stages:
        names = [name for name in found if name.startswith(stage) and name != "input_blocks.0"]
        for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]) if "." in name else 0):
            yield name, sorted(found[name])
