"""Weights by component and block, as sd-mecha 0.0.29 writes them, in a recipe that is saved and read again."""

import remelt.compat.sd_mecha as sd_mecha

text_encoder_recipe = sd_mecha.add_perpendicular(
    sd_mecha.model("ghostmix_v20Bakedvae", "sd1"),
    sd_mecha.model("dreamshaper_332BakedVaeClipFix", "sd1"),
    sd_mecha.model("deliberate_v2", "sd1"),
)
unet_recipe = sd_mecha.weighted_sum(
    sd_mecha.model("ghostmix_v20Bakedvae", "sd1"),
    sd_mecha.model("dreamshaper_332BakedVaeClipFix", "sd1"),
)
recipe = sd_mecha.weighted_sum(
    text_encoder_recipe,
    unet_recipe,
    alpha=(sd_mecha.default("sd1", "txt", 0.33) | sd_mecha.blocks("sd1", "txt", in2=0.75)),
)
sd_mecha.serialize_and_save(recipe, "recipes/block_weights")

again = sd_mecha.deserialize("recipes/block_weights.mecha")
sd_mecha.RecipeMerger(models_dir="models").merge_and_save(again, output="block_weights")
