"""Reported figures of published attentions; tables, scripts and tests read them from here.

A figure that its authors did not report, or that is not available, is None.
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """How a reported model was trained.

    Attributes:
        text: a few words on its training, and on what differs from the model of this project.
        same: recipe in `configs/recipe/`, or experiment such as `published/inline_deit_tiny`, of this project with the
            same model and training; empty if there is none.
    """

    text: str
    same: str = ""


class Reported(NamedTuple):
    """A reported figure.

    Attributes:
        method: name of the attention variant, see `vca.attention.variant_name`.
        model: the experiment's name for the model (`deit_tiny`, `sit_s_2`, `dit_s_2_512`), else that of the authors.
        params: parameters in millions.
        macs: multiply-adds in billions.
        metric: `top-1 (%)` on ImageNet-1K, `FID-50K` without guidance, or `Inception Score`.
        value: value of the metric.
        source: arXiv number and venue, and where in it.
        recipe: how the model was trained.
    """

    method: str
    model: str
    params: float | None
    macs: float | None
    metric: str
    value: float | None
    source: str
    recipe: Recipe


TOP1, FID, IS = "top-1 (%)", "FID-50K", "Inception Score"

VCA = "arXiv 2511.00833, NeurIPS 2025"
T1, T2, T3, T4 = (f"{VCA}, Table {number}" for number in (1, 2, 3, 4))
DEIT, MHLA = "arXiv 2012.12877, README", "arXiv 2601.07832v2, ICLR 2026, paper"
AGENT, CIRCULANT = "arXiv 2312.08874, ECCV 2024, README", "arXiv 2512.21542, AAAI 2026, README"
VITTT, INLINE = "arXiv 2512.01643, CVPR 2026, README", "arXiv 2412.06590, NeurIPS 2024, README"
DIFFERENTIAL_V2 = "Microsoft, 2026, article"
POLA, MALA = "arXiv 2501.15061, ICLR 2025, README", "arXiv 2507.00698, ICCV 2025, abstract"

AS_DEIT, AS_PVT = Recipe("DeiT's, 300 epochs", "deit_original"), Recipe("PVT's, 300 epochs", "pvt")
AS_SWIN, AS_CSWIN = Recipe("Swin's, 300 epochs", "swin"), Recipe("CSwin's, 310 epochs, EMA", "cswin")
AS_DIT = Recipe("DiT's, 400,000 steps, EMA", "dit")
RAW = Recipe("DeiT's, 300 epochs, raw weights reported, EMA measured here")
AGENT_TINY = Recipe("300 epochs, batch 4096, no EMA", "agent_deit_tiny")
AGENT_SMALL = Recipe("300 epochs, no repeated augmentation, no EMA", "agent_deit_small")
AGENT_PVT = Recipe("310 epochs, no repeated augmentation", "agent_pvt_tiny")
AGENT_OTHER, AGENT_CSWIN = Recipe(AGENT_SMALL.text), Recipe("310 epochs, batch 1024, EMA")
MHLA_DEIT = "200 epochs, EMA, mixup 0.2; 224 px, padded to 256; gain over linear attention (abstract): +3.6 %"
MHLA_DIT = "80 epochs, EMA; sampling settings unknown"
MHLA_DROPOUT = Recipe(f"{MHLA_DIT}; dropout 0.1 after the projection")
LINEAR_DIT = Recipe(f"{MHLA_DIT}; the baseline of MHLA, feature map and norm unknown")
LEAPLAB = "300 epochs, 20 of warm-up, clipping at 5, no EMA"
WITH_CONVOLUTION = Recipe(f"{LEAPLAB}; no class token, no positions, 3x3 convolution before each block")
CIRCULANT_TINY = Recipe(WITH_CONVOLUTION.text, "published/circulant_deit_tiny")
CIRCULANT_SMALL = Recipe(WITH_CONVOLUTION.text, "published/circulant_deit_small")
VITTT_TINY = Recipe(f"{WITH_CONVOLUTION.text}; 6 heads", "published/ttt_deit_tiny")
VITTT_SMALL = Recipe(WITH_CONVOLUTION.text, "published/ttt_deit_small")
VITTT_DIT = Recipe("EMA, 250 sampling steps, retrained, length unknown; 3x3 convolution before each block")
INLINE_TINY = Recipe(f"{LEAPLAB}; 6 heads", "published/inline_deit_tiny")
INLINE_SMALL = Recipe(f"{LEAPLAB}; width 320, 10 heads", "published/inline_deit_small")
INLINE_OTHER, INLINE_CSWIN = Recipe(LEAPLAB), Recipe("300 epochs, EMA")
NO_FIGURE = Recipe("no ImageNet figure")
POLA_PVT, POLA_SWIN = Recipe("310 epochs, 5 of warm-up, no clipping; no final norm"), Recipe("unknown")
MALA_SMALL = Recipe("300 epochs; stages 3 and 4 are softmax attention")

EMBEDDING = "vca-positive_stream_embedding-negative_stream_embedding"
MHLA_IN_DIT = "mhla-local_kernel_3-qk_norm_false-pieces_4x4-local_identity_true"
LINEAR_RELU = "linear-qk_norm_true-feature_map_relu"

REPORTED = (
    # The softmax parameters of Swin (28.9) and CSwin (20.5) match no known model.
    Reported("softmax", "deit_tiny", 5.7, 1.2, TOP1, 72.2, T1, AS_DEIT),
    Reported("vca", "deit_tiny", 6.0, 1.2, TOP1, 75.6, T1, AS_DEIT),
    Reported("softmax", "deit_small", 22.1, 4.6, TOP1, 79.8, T1, AS_DEIT),
    Reported("vca", "deit_small", 22.6, 4.6, TOP1, 80.7, T1, AS_DEIT),
    Reported("softmax", "pvt_tiny", 13.2, 1.9, TOP1, 75.1, T1, AS_PVT),
    Reported("vca", "pvt_tiny", 11.6, 2.0, TOP1, 78.2, T1, AS_PVT),
    Reported("softmax", "swin_tiny", 28.9, 4.5, TOP1, 81.3, T1, AS_SWIN),
    Reported("vca", "swin_tiny", 28.5, 4.6, TOP1, 82.3, T1, AS_SWIN),
    Reported("softmax", "cswin_tiny", 20.5, 4.3, TOP1, 82.7, T1, AS_CSWIN),
    Reported("vca", "cswin_tiny", 20.4, 4.3, TOP1, 83.3, T1, AS_CSWIN),
    Reported("softmax", "dit_s_2", None, None, FID, 67.2, T2, AS_DIT),
    Reported("vca", "dit_s_2", None, None, FID, 62.3, T2, AS_DIT),
    Reported("softmax", "dit_s_4", None, None, FID, 97.9, T2, AS_DIT),
    Reported("vca", "dit_s_4", None, None, FID, 92.7, T2, AS_DIT),
    Reported("softmax", "dit_s_8", None, None, FID, None, T2, AS_DIT),
    Reported("vca", "dit_s_8", None, None, FID, None, T2, AS_DIT),
    Reported("softmax", "dit_b_2", None, None, FID, 42.9, T2, AS_DIT),
    Reported("vca", "dit_b_2", None, None, FID, 38.9, T2, AS_DIT),
    Reported("softmax", "dit_b_4", None, None, FID, None, T2, AS_DIT),
    Reported("vca", "dit_b_4", None, None, FID, None, T2, AS_DIT),
    Reported("softmax", "dit_b_8", None, None, FID, None, T2, AS_DIT),
    Reported("vca", "dit_b_8", None, None, FID, None, T2, AS_DIT),
    Reported("softmax", "dit_s_2_512", None, None, FID, None, T2, AS_DIT),
    Reported("vca", "dit_s_2_512", None, None, FID, None, T2, AS_DIT),
    Reported("softmax", "sit_s_2", None, None, FID, 57.3, T2, AS_DIT),
    Reported("vca", "sit_s_2", None, None, FID, 53.0, T2, AS_DIT),
    Reported("softmax", "sit_b_2", None, None, FID, 35.3, T2, AS_DIT),
    Reported("vca", "sit_b_2", None, None, FID, 32.7, T2, AS_DIT),
    Reported("vca-stage2_plain", "deit_tiny", None, None, TOP1, 75.4, T3, AS_DEIT),
    Reported("vca-stage2_plain", "dit_s_2", None, None, FID, 64.6, T3, AS_DIT),
    Reported("vca-stage1_plain", "deit_tiny", None, None, TOP1, 75.5, T3, AS_DEIT),
    Reported("vca-stage1_plain", "dit_s_2", None, None, FID, 64.3, T3, AS_DIT),
    Reported("differential_stages", "deit_tiny", None, None, TOP1, 75.1, T3, AS_DEIT),
    Reported("differential_stages", "dit_s_2", None, None, FID, 63.9, T3, AS_DIT),
    Reported(EMBEDDING, "deit_tiny", None, None, TOP1, 75.1, T4, AS_DEIT),
    Reported(EMBEDDING, "dit_s_2", None, None, FID, 63.7, T4, AS_DIT),
    # Other sources.
    Reported("softmax", "deit_tiny", 5.7, None, TOP1, 72.2, DEIT, RAW),
    Reported("softmax", "deit_small", 22.1, None, TOP1, 79.8, DEIT, RAW),
    Reported("softmax", "dit_s_2", None, None, FID, 68.4, MHLA, Recipe(MHLA_DIT)),
    Reported("agent", "deit_tiny", 6.0, 1.2, TOP1, 74.9, AGENT, AGENT_TINY),
    Reported("agent", "deit_small", 22.7, 4.4, TOP1, 80.5, AGENT, AGENT_SMALL),
    Reported("agent", "deit_base", 87.2, 17.6, TOP1, 82.0, AGENT, AGENT_OTHER),
    Reported("agent", "pvt_tiny", 11.6, 2.0, TOP1, 78.4, AGENT, AGENT_PVT),
    Reported("agent", "swin_tiny", 29, 4.5, TOP1, 82.6, AGENT, AS_SWIN),
    Reported("agent", "cswin_tiny", 21, 4.3, TOP1, 83.1, AGENT, AGENT_CSWIN),
    Reported(LINEAR_RELU, "dit_s_2", None, None, FID, 89.7, MHLA, LINEAR_DIT),
    Reported(MHLA_IN_DIT, "dit_s_2", None, None, FID, 59.8, MHLA, MHLA_DROPOUT),
    Reported("mhla-pieces_4x4", "deit_tiny_256", None, None, TOP1, None, MHLA, Recipe(MHLA_DEIT)),
    Reported("mhla", "unknown", None, None, TOP1, 84.6, "third-party page", Recipe("unknown; its best figure")),
    Reported("mhla", "unknown", None, None, FID, 19.16, "third-party page", Recipe("unknown; its best figure")),
    Reported("circulant", "deit_tiny", 6.1, 1.2, TOP1, 75.0, CIRCULANT, CIRCULANT_TINY),
    Reported("circulant", "deit_small", 23.8, 4.8, TOP1, 81.0, CIRCULANT, CIRCULANT_SMALL),
    Reported("circulant", "deit_base", 93.6, 18.9, TOP1, 82.3, CIRCULANT, WITH_CONVOLUTION),
    Reported("ttt", "deit_tiny", 6, 1.2, TOP1, 76.5, VITTT, VITTT_TINY),
    Reported("ttt", "deit_small", 24, 4.8, TOP1, 81.6, VITTT, VITTT_SMALL),
    Reported("ttt", "deit_base", 90, 18.0, TOP1, 82.6, VITTT, WITH_CONVOLUTION),
    Reported("ttt", "H-ViT3-T", 29, 4.9, TOP1, 84.0, VITTT, Recipe("EMA and MESA; hierarchical model")),
    Reported("ttt", "dit_b_2", None, None, FID, 39.44, VITTT, VITTT_DIT),
    Reported("ttt", "dit_b_2", None, None, IS, 37.22, VITTT, VITTT_DIT),
    Reported("ttt", "dit_b_4", None, None, FID, 65.25, VITTT, VITTT_DIT),
    Reported("ttt", "dit_b_4", None, None, IS, 22.28, VITTT, VITTT_DIT),
    Reported("ttt", "dit_b_8", None, None, FID, 120.82, VITTT, VITTT_DIT),
    Reported("ttt", "dit_b_8", None, None, IS, 10.87, VITTT, VITTT_DIT),
    Reported("inline", "deit_tiny", 6.5, 1.1, TOP1, 74.5, INLINE, INLINE_TINY),
    Reported("inline", "deit_small_288", 16.7, 5.0, TOP1, 80.2, INLINE, INLINE_SMALL),
    Reported("inline", "pvt_tiny", 12.0, 2.0, TOP1, 78.2, INLINE, INLINE_OTHER),
    Reported("inline", "swin_tiny", 30, 4.5, TOP1, 82.4, INLINE, INLINE_OTHER),
    Reported("inline", "cswin_tiny", 25, 4.3, TOP1, 83.2, INLINE, INLINE_CSWIN),
    Reported("differential_v2", "language models", None, None, TOP1, None, DIFFERENTIAL_V2, NO_FIGURE),
    Reported("polaformer", "pvt_tiny", None, None, TOP1, 78.8, POLA, POLA_PVT),
    Reported("polaformer", "pvt_small", None, None, TOP1, 81.9, POLA, POLA_PVT),
    Reported("polaformer", "swin_tiny", None, None, TOP1, 82.6, POLA, POLA_SWIN),
    Reported("polaformer", "swin_small", None, None, TOP1, 83.6, POLA, POLA_SWIN),
    Reported("polaformer", "swin_base", None, None, TOP1, 83.8, POLA, POLA_SWIN),
    Reported("mala", "MALA-S", 27, 4.6, TOP1, 84.7, MALA, MALA_SMALL),
)

# The VCA paper's rows of Tables 1 and 2, and its figures by model and method.
CLASSIFIERS = {
    "deit_tiny": "DeiT-Tiny",
    "deit_small": "DeiT-Small",
    "pvt_tiny": "PVT-Tiny",
    "swin_tiny": "Swin-Tiny",
    "cswin_tiny": "CSwin-Tiny",
}
GENERATORS = {
    "dit_s_2": "DiT-S/2",
    "dit_s_4": "DiT-S/4",
    "dit_s_8": "DiT-S/8",
    "dit_b_2": "DiT-B/2",
    "dit_b_4": "DiT-B/4",
    "dit_b_8": "DiT-B/8",
    "dit_s_2_512": "DiT-S/2 at 512 px",
    "sit_s_2": "SiT-S/2",
    "sit_b_2": "SiT-B/2",
}
PAPER = {(row.model, row.method): row for row in REPORTED if row.source in (T1, T2, T3, T4)}
