"""Transformer TTS: where each tensor of ours stands in ESPnet's state dict, and in that of the layout of soobinseo.

Queries, keys and values of a self-attention are one matrix of ours, keys and values of a cross-attention another. ESPnet's encoder has its
feed-forward layers as convolutions of width one; the values are the same.
"""

from __future__ import annotations

import itertools

from foveal.audio.models.concatenating_tts import ConcatenatingTTS, ConcatenatingTTSConfig
from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
from foveal.core.systems import Adapter, System

_KEYWORDS = {
    "idim": "symbols",
    "odim": "mels",
    "embed_dim": "embed_channels",
    "eprenet_conv_layers": "prenet_layers",
    "eprenet_conv_chans": "prenet_channels",
    "eprenet_conv_filts": "prenet_kernel",
    "adim": "dim",
    "aheads": "heads",
    "elayers": "encoder_layers",
    "eunits": "encoder_hidden",
    "dlayers": "decoder_layers",
    "dunits": "decoder_hidden",
    "dprenet_layers": "frame_prenet_layers",
    "dprenet_units": "frame_prenet_channels",
    "postnet_layers": "postnet_layers",
    "postnet_chans": "postnet_channels",
    "postnet_filts": "postnet_kernel",
    "encoder_normalize_before": "encoder_norm_first",
    "decoder_normalize_before": "decoder_norm_first",
    "use_scaled_pos_enc": "scaled_positions",
    "reduction_factor": "reduction",
    "transformer_enc_dropout_rate": "dropout",
    "eprenet_dropout_rate": "prenet_dropout",
    "dprenet_dropout_rate": "frame_prenet_dropout",
    "postnet_dropout_rate": "postnet_dropout",
}

#: The authors' constructor keeps the losses with the network; these say how to train, not what the network is.
_TRAINING = (
    "use_masking",
    "use_weighted_masking",
    "bce_pos_weight",
    "loss_type",
    "init_type",
    "init_enc_alpha",
    "init_dec_alpha",
    "use_guided_attn_loss",
    "num_heads_applied_guided_attn",
    "num_layers_applied_guided_attn",
    "modules_applied_guided_attn",
    "guided_attn_loss_sigma",
    "guided_attn_loss_lambda",
    "transformer_enc_positional_dropout_rate",
    "transformer_enc_attn_dropout_rate",
    "transformer_dec_dropout_rate",
    "transformer_dec_positional_dropout_rate",
    "transformer_dec_attn_dropout_rate",
    "transformer_enc_dec_attn_dropout_rate",
)

Table = dict[str, list[tuple[str, tuple[int, ...]]]]


def _table(model: TransformerTTS) -> Table:
    config, table = model.config, Table()
    dim = config.dim

    def entry(ours: str, *official: tuple[str, tuple[int, ...]]) -> None:
        table[ours] = list(official)

    def linear(ours: str, *theirs: str, shape: tuple[int, ...] = (dim, dim)) -> None:
        entry(f"{ours}.weight", *((f"{key}.weight", shape) for key in theirs))
        entry(f"{ours}.bias", *((f"{key}.bias", shape[:1]) for key in theirs))

    def convolutions(ours: str, theirs: str, widths: list[int], kernel: int) -> None:
        for index, (wide, to) in enumerate(itertools.pairwise(widths)):
            entry(f"{ours}.convolutions.{index}.weight", (f"{theirs}.{index}.0.weight", (to, wide, kernel)))
            for name in ("weight", "bias", "running_mean", "running_var"):
                entry(f"{ours}.norms.{index}.{name}", (f"{theirs}.{index}.1.{name}", (to,)))
            entry(f"{ours}.norms.{index}.num_batches_tracked", (f"{theirs}.{index}.1.num_batches_tracked", ()))

    def attention(ours: str, theirs: str, crossed: bool) -> None:
        query, key, value = (f"{theirs}.linear_{part}" for part in "qkv")
        if crossed:
            linear(f"{ours}.query", query)
            linear(f"{ours}.key_value", key, value)
        else:
            linear(f"{ours}.query_key_value", query, key, value)
        linear(f"{ours}.project", f"{theirs}.linear_out")

    def norms(ours: str, theirs: str, *names: str) -> None:
        for number, name in enumerate(names, 1):
            linear(f"{ours}.{name}", f"{theirs}.norm{number}", shape=(dim,))

    if config.prenet_layers:
        entry("embedding.weight", ("encoder.embed.0.0.embed.weight", (config.symbols, config.embed_channels)))
        widths = [config.embed_channels, *[config.prenet_channels] * config.prenet_layers]
        convolutions("symbol_prenet", "encoder.embed.0.0.convs", widths, config.prenet_kernel)
        linear("symbol_prenet.project", "encoder.embed.0.1", shape=(dim, config.prenet_channels))
    else:
        entry("embedding.weight", ("encoder.embed.0.weight", (config.symbols, dim)))
    if config.scaled_positions:
        entry("symbol_positions.alpha", ("encoder.embed.1.alpha", ()))
        entry("frame_positions.alpha", ("decoder.embed.1.alpha", ()))
    for index in range(config.encoder_layers):
        ours, theirs = f"encoder.{index}", f"encoder.encoders.{index}"
        attention(f"{ours}.attention", f"{theirs}.self_attn", crossed=False)
        linear(f"{ours}.feed_forward.expand", f"{theirs}.feed_forward.w_1", shape=(config.encoder_hidden, dim, 1))
        linear(f"{ours}.feed_forward.contract", f"{theirs}.feed_forward.w_2", shape=(dim, config.encoder_hidden, 1))
        norms(ours, theirs, "attention_norm", "feed_forward_norm")
    if config.encoder_norm_first:
        linear("encoder_norm", "encoder.after_norm", shape=(dim,))
    widths = [config.mels, *[config.frame_prenet_channels] * config.frame_prenet_layers]
    for index, (wide, to) in enumerate(itertools.pairwise(widths)):
        linear(f"frame_prenet.layers.{index}", f"decoder.embed.0.0.prenet.{index}.0", shape=(to, wide))
    linear("frame_prenet.project", "decoder.embed.0.1", shape=(dim, widths[-1]))
    for index in range(config.decoder_layers):
        ours, theirs = f"decoder.{index}", f"decoder.decoders.{index}"
        attention(f"{ours}.attention", f"{theirs}.self_attn", crossed=False)
        attention(f"{ours}.cross_attention", f"{theirs}.src_attn", crossed=True)
        linear(f"{ours}.feed_forward.expand", f"{theirs}.feed_forward.w_1", shape=(config.decoder_hidden, dim))
        linear(f"{ours}.feed_forward.contract", f"{theirs}.feed_forward.w_2", shape=(dim, config.decoder_hidden))
        norms(ours, theirs, "attention_norm", "cross_attention_norm", "feed_forward_norm")
    if config.decoder_norm_first:
        linear("decoder_norm", "decoder.after_norm", shape=(dim,))
    linear("mel", "feat_out", shape=(config.mels * config.reduction, dim))
    linear("stop", "prob_out", shape=(config.reduction, dim))
    if config.postnet_layers:
        widths = [config.mels, *[config.postnet_channels] * (config.postnet_layers - 1), config.mels]
        convolutions("postnet", "postnet.postnet", widths, config.postnet_kernel)
    entry("stop_weight", ("criterion.bce_criterion.pos_weight", ()))
    return table


SPEECH = Adapter(
    system=System(
        name="transformer_tts",
        title="symbols to mel spectrogram; ESPnet's layout, its LJSpeech recipe is the default",
        paper="Li, Liu, Liu, Zhao, Liu: Neural Speech Synthesis with Transformer Network, AAAI 2019",
        parameters=33_032_947,
        repository="github.com/espnet/espnet",
        licence="Apache-2.0",
    ),
    config=TransformerTTSConfig,
    build=lambda config, official: TransformerTTS(config),
    table=_table,
    model=TransformerTTS,
    keywords=_KEYWORDS,
    ignored=_TRAINING,
)


def _concatenating_table(model: ConcatenatingTTS) -> Table:
    config, table = model.config, Table()
    dim, hidden = config.dim, 4 * config.dim

    def linear(ours: str, *theirs: str, shape: tuple[int, ...], bias: bool = True) -> None:
        table[f"{ours}.weight"] = [(f"{key}.weight", shape) for key in theirs]
        if bias:
            table[f"{ours}.bias"] = [(f"{key}.bias", shape[:1]) for key in theirs]

    def norm(ours: str, theirs: str) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            table[f"{ours}.{name}"] = [(f"{theirs}.{name}", (dim,))]
        table[f"{ours}.num_batches_tracked"] = [(f"{theirs}.num_batches_tracked", ())]

    def positions(ours: str, theirs: str) -> None:
        table[f"{ours}.alpha"] = [(f"{theirs}.alpha", (1,))]
        table[f"{ours}.table"] = [(f"{theirs}.pos_emb.weight", tuple(model.symbol_positions.table.shape))]

    def attention(ours: str, theirs: str) -> None:
        linear(f"{ours}.query", f"{theirs}.query.linear_layer", shape=(dim, dim), bias=False)
        linear(f"{ours}.key_value", f"{theirs}.key.linear_layer", f"{theirs}.value.linear_layer", shape=(dim, dim), bias=False)
        linear(f"{ours}.project", f"{theirs}.final_linear.linear_layer", shape=(dim, 2 * dim))
        linear(f"{ours}.norm", f"{theirs}.layer_norm_1", shape=(dim,))

    def feed_forward(ours: str, theirs: str) -> None:
        linear(f"{ours}.expand", f"{theirs}.w_1.conv", shape=(hidden, dim, 1))
        linear(f"{ours}.contract", f"{theirs}.w_2.conv", shape=(dim, hidden, 1))
        linear(f"{ours}.norm", f"{theirs}.layer_norm", shape=(dim,))

    positions("symbol_positions", "encoder")
    positions("frame_positions", "decoder")
    prenet = "encoder.encoder_prenet"
    table["symbol_prenet.embedding.weight"] = [(f"{prenet}.embed.weight", (config.symbols, config.embed_channels))]
    for index, wide in enumerate((config.embed_channels, dim, dim)):
        linear(f"symbol_prenet.convolutions.{index}", f"{prenet}.conv{index + 1}.conv", shape=(dim, wide, 5))
        norm(f"symbol_prenet.norms.{index}", f"{prenet}.batch_norm{index + 1}")
    linear("symbol_prenet.project", f"{prenet}.projection.linear_layer", shape=(dim, dim))
    linear("frame_prenet.layers.0", "decoder.decoder_prenet.layer.fc1.linear_layer", shape=(2 * dim, config.mels))
    linear("frame_prenet.layers.1", "decoder.decoder_prenet.layer.fc2.linear_layer", shape=(dim, 2 * dim))
    linear("frame_prenet.project", "decoder.norm.linear_layer", shape=(dim, dim))
    for index in range(config.layers):
        attention(f"encoder.{index}.attention", f"encoder.layers.{index}")
        feed_forward(f"encoder.{index}.feed_forward", f"encoder.ffns.{index}")
        attention(f"decoder.{index}.attention", f"decoder.selfattn_layers.{index}")
        attention(f"decoder.{index}.cross_attention", f"decoder.dotattn_layers.{index}")
        feed_forward(f"decoder.{index}.feed_forward", f"decoder.ffns.{index}")
    linear("mel", "decoder.mel_linear.linear_layer", shape=(config.mels, dim))
    linear("stop", "decoder.stop_linear.linear_layer", shape=(1, dim))
    postnet = "decoder.postconvnet"
    convolutions = ["conv1", "conv_list.0", "conv_list.1", "conv_list.2", "conv2"]
    for index, (name, (wide, to)) in enumerate(zip(convolutions, itertools.pairwise([config.mels, *[dim] * 4, config.mels]), strict=True)):
        linear(f"postnet.convolutions.{index}", f"{postnet}.{name}.conv", shape=(to, wide, 5))
    for index, name in enumerate(("pre_batchnorm", *(f"batch_norm_list.{number}" for number in range(3)))):
        norm(f"postnet.norms.{index}", f"{postnet}.{name}")
    return table


CONCATENATING = Adapter(
    system=System(
        name="transformer_tts_soobinseo",
        title="symbols to mel spectrogram; the layout of github.com/soobinseo/Transformer-TTS",
        paper="Li, Liu, Liu, Zhao, Liu: Neural Speech Synthesis with Transformer Network, AAAI 2019",
        parameters=9_542_307,
        repository="github.com/soobinseo/Transformer-TTS",
        licence="MIT",
    ),
    config=ConcatenatingTTSConfig,
    build=lambda config, official: ConcatenatingTTS(config),
    table=_concatenating_table,
    model=ConcatenatingTTS,
    keywords={
        "symbols": "symbols",
        "embedding_size": "embed_channels",
        "hidden_size": "dim",
        "num_mels": "mels",
        "heads": "heads",
        "layers": "layers",
        "outputs_per_step": "reduction",
    },
)
