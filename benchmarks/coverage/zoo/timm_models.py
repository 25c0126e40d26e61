"""Models of timm: a name, the size of the images, and arguments of `create_model`."""

from __future__ import annotations

from torch import nn

from benchmarks.coverage.zoo.entry import Entry, images, member

_CONVOLUTIONAL = """
    resnet18 resnet10t resnet26d resnext26ts seresnet18 seresnet33ts legacy_seresnet18 resnetblur18 skresnet18
    ecaresnet26t gcresnext26ts resnest14d res2net50_26w_4s resnetv2_18 resnetv2_50x1_bit nf_regnet_b0 nf_resnet26
    regnetx_002 regnety_002 regnetz_b16 gernet_s repvgg_a0 mobileone_s0 dpn68 cspdarknet53 cs3darknet_s cspresnet50
    ese_vovnet19b_dw dla46_c dla34 hrnet_w18_small densenet121 selecsls42b
    mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    efficientnet_b0 tf_efficientnetv2_b0 lcnet_050 mixnet_s mnasnet_small semnasnet_050 fbnetc_100 tinynet_e
    hardcorenas_a rexnet_100 ghostnet_050 ghostnetv2_100 repghostnet_050 tf_mobilenetv3_small_075
    convnext_atto convnextv2_atto mambaout_femto poolformer_s12 poolformerv2_s12 inception_next_atto starnet_s050
    fasternet_t0 repvit_m0_9 hgnetv2_b0 edgenext_xx_small efficientvit_b0 pvt_v2_b0
    fastvit_t8 swiftformer_xs lambda_resnet26t
    test_resnet test_byobnet test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
    test_convnext test_convnext2 test_nfnet test_mambaout
"""
# Built for one size of image: timm's own smallest, or one given at creation.
_SIZED = {
    "botnet26t_256": 128,
    "vit_tiny_patch16_224": 64,
    "deit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "mixer_s32_224": 96,
    "gmlp_s16_224": 64,
    "resmlp_12_224": 64,
    "cait_xxs24_224": 64,
    "convit_tiny": 64,
    "pit_ti_224": 96,
    "coat_lite_tiny": 64,
    "xcit_nano_12_p16_224": 64,
    "mvitv2_tiny": 64,
    "davit_tiny": 64,
    "focalnet_tiny_srf": 64,
    "sequencer2d_s": 64,
    "hiera_tiny_224": 96,
    "efficientformerv2_s0": 64,
}
_SIZE_OF_TIMM = {
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "levit_128s": 224,
    "visformer_tiny": 224,
    "efficientformer_l1": 224,
    "efficientvit_m0": 224,
    "crossvit_tiny_240": 240,
    "tiny_vit_5m_224": 224,
    "test_vit": 160,
    "test_maxvit": 160,
    "test_coatnet": 160,
}
_WITHOUT_SIZE = {"davit_tiny", "focalnet_tiny_srf"}


def _entry(name: str, size: int, sized: bool = False) -> Entry:
    arguments = {"img_size": size} if sized and name not in _WITHOUT_SIZE else {}

    def build() -> nn.Module:
        model: nn.Module = member("timm", "create_model")(name, pretrained=False, **arguments)
        return model

    return Entry(f"timm/{name}", "timm", build, images(size))


ENTRIES = [
    *(_entry(name, 64) for name in _CONVOLUTIONAL.split()),
    *(_entry(name, size, sized=True) for name, size in _SIZED.items()),
    *(_entry(name, size) for name, size in _SIZE_OF_TIMM.items()),
]
