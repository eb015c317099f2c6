"""A script for the first release of sd-mecha with only its import changed."""

import remelt.compat.sd_mecha as sd_mecha

recipe = sd_mecha.weighted_sum(
    sd_mecha.weighted_sum("ghostmix_v20Bakedvae", "deliberate_v2", alpha=0.5),
    "dreamshaper_332BakedVaeClipFix",
    alpha=0.33,
)

scheduler = sd_mecha.MergeScheduler(base_dir="models")
scheduler.merge_and_save(recipe, output_path="scheduled_merge")
