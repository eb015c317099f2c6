"""A script for sd-mecha 0.0.29 with only its import changed: two models by name, from a folder of models."""

import remelt.compat.sd_mecha as sd_mecha

sd_mecha.set_log_level()

recipe = sd_mecha.weighted_sum("ghostmix_v20Bakedvae", "dreamshaper_332BakedVaeClipFix")

merger = sd_mecha.RecipeMerger(models_dir="models")
merger.merge_and_save(recipe, output="basic_merge")
