"""Keys of RAT."""

from __future__ import annotations

from foveal.core.official import Source
from foveal.core.systems import Adapter, System
from foveal.medical.checkpoints.prefixes import table_by_prefix
from foveal.medical.models.rat import RAT, RATConfig, RegionBlock, RegionLayer

_OF_A_LAYER = {
    "norm_region": "norm_ra", "region.qkv": "ra.qkv", "region.project": "ra.project_out", "region_weight": "lambda_ra",
    "norm_region_mlp": "norm_ra_mlp", "region_mlp.0": "mlp_ra.fc1", "region_mlp.2": "mlp_ra.fc2", "norm_window": "norm_wa",
    "window.qkv": "wa.qkv", "window.project": "wa.proj_out", "window_weight": "lambda_wa", "norm_window_mlp": "norm_wa_mlp",
    "window_mlp.0": "mlp_wa.fc1", "window_mlp.2": "mlp_wa.fc2",
}  # fmt: skip


def layer_table(layer: RegionLayer) -> dict[str, list[Source]]:
    """Where each tensor of one layer stands in the authors' `BasicLayer`."""
    return table_by_prefix(layer, _OF_A_LAYER)


def _table(model: RAT) -> dict[str, list[Source]]:
    prefixes = {name: name for name in ("intro", "ending", "downs")}
    prefixes |= {f"ups.{index}": f"ups.{index}.0" for index in range(len(model.ups))}
    for side, levels in (("encoders", model.config.encoder_blocks), ("decoders", model.config.decoder_blocks)):
        for level, depth in enumerate(levels):
            for block in range(depth):
                prefixes[f"{side}.{level}.{block}"] = f"{side}.{level}.{block}"
                prefixes[f"{side}.{level}.{block}.channels"] = f"{side}.{level}.{block}.sca.1"
    for number, layers in enumerate(model.middle):
        assert isinstance(layers, RegionBlock)
        prefixes[f"middle.{number}.conv"] = f"middle_blks.{number}.conv"
        for index in range(len(layers.layers)):
            prefixes |= {
                f"middle.{number}.layers.{index}.{ours}": f"middle_blks.{number}.layers.{index}.{theirs}" for ours, theirs in _OF_A_LAYER.items()
            }
    return table_by_prefix(model, prefixes)


RAT_SYSTEM = Adapter(
    system=System(
        name="rat",
        title="restoration by attention inside regions: denoising, enlargement, synthesis",
        paper="Yang et al.: Region Attention Transformer for Medical Image Restoration, MICCAI 2024 (arXiv:2407.09268)",
        parameters=15_945_025,
        repository="github.com/Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration",
        licence="Apache-2.0",
    ),
    config=RATConfig,
    build=lambda config, official: RAT(config),
    table=_table,
    model=RAT,
    keywords={
        "scale": "scale", "img_channel": "channels", "width": "width", "middle_blk_num": "middle_layers", "enc_blk_nums": "encoder_blocks",
        "dec_blk_nums": "decoder_blocks",
    },
)  # fmt: skip
