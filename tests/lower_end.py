"""What the oldest timm and torch lack, and which tests cannot pass there for that reason.

Each timm named is the first seen to have it, or 1.0.31 where only the two ends were tried; of torch, 2.6 was tried.

`scripts/test --oldest` runs the rest on the versions of tests/oldest.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import timm
import torch


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


TIMM, TORCH = _version(timm.__version__), _version(torch.__version__)

# (what lacks something, why that matters, tests: a file, "::" and the beginning of a test's name with its parameters)
LACKS: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
    (
        TIMM < (1, 0, 31),
        "timm keeps with a model what it was built with since 1.0.31; before, save_for_hf has to be told",
        (
            "test_registry.py::test_surgery_name_needs_base_and_recipe",
            "test_spans.py::test_mask_depth_is_saved_with_the_model",
            "test_surgery.py::test_operate_makes_model_describe_itself",
            "test_loading.py::test_loaders_take_base_and_surgical[test_vit_se-by_directory",
            "test_loading.py::test_loaders_take_base_and_surgical[swin_tiny_patch4_window7"
            "_224_nonlocal_s3-by_directory",
            "test_loading.py::test_save_for_hf_round_trip_adapts",
            "test_loading.py::test_hub_repository_loads_offline",
            "test_block_kinds.py::test_saved_model_loads_at_another_size",
            "test_block_kinds.py::test_auto_options_are_saved_with_model",
            "test_block_kinds.py::test_no_auto_options_saves_no_settled",
            "test_memory_guard.py::test_limit_and_auto_are_saved_with_model",
            "test_memory_guard.py::test_settled_numbers_saved_at_other_size",
            "test_memory_guard.py::test_settled_numbers_of_two_operations",
            "test_stock.py::test_export_detects_other_options[fresh",
        ),
    ),
    (
        TIMM < (1, 0, 31),
        "before 1.0.31 timm takes the safetensors of a directory for a pickle, where no block of ours is in it",
        (
            "test_checkpoint.py::test_written_directory_builds_the_model",
            "test_stock.py::test_export_loads_by_timm_alone",
            "test_stock.py::test_export_refuses_plain_models_folders",
        ),
    ),
    (
        TIMM < (1, 0, 31),
        "timm 1.0.20 cannot build this on the meta device",
        (
            "test_models.py::test_classifier_is_exchangeable",
            "test_parity.py::test_surgery_equals_timms_model[regnety_002",
            "test_parity.py::test_surgery_equals_timms_model[seresnext26ts",
            "test_parity.py::test_surgery_equals_timms_model[gcresnext26ts",
            "test_parity.py::test_surgery_equals_timms_model[bat_resnext26ts",
            "test_parity.py::test_false_friends_differ",
            "test_timm_attn.py::test_timm_block_fills_a_free_place",
            *(
                f"test_memory_guard.py::test_plan_matches_the_operated_model[{name}"
                for name in ("test_convnext", "test_vit", "test_byobnet")
            ),
        ),
    ),
    (
        TIMM < (1, 0, 31),
        "timm 1.0.20 does not have these attentions",
        (
            "test_timm_attn.py::test_timm_names_are_all_blocks",
            *(
                f"test_timm_attn.py::test_timm_block_starts_at_identity[{name}"
                for name in ("coord", "scoord", "ela", "strip")
            ),
            "test_timm_attn.py::test_timm_block_refuses_unfit_options[ela",
        ),
    ),
    (
        TIMM < (1, 0, 31),
        "timm 1.0.20 does not have these models, or does not build them so small",
        tuple(
            f"test_block_kinds.py::test_tokens_of_short_vits_are_in_order[{depth}-vit_small_patch16_dinov3"
            for depth in (1, 2)
        ),
    ),
    (
        TIMM < (1, 0, 31),
        "timm 1.0.20 takes no height and width for this one, which the checks want to be different",
        ("test_coverage.py::test_families_pass_all_checks[efficientvit_msra",),
    ),
    (
        TIMM < (1, 0, 21),
        "the fault of timm's gather-excite that this tells of came with 1.0.21",
        ("test_timm_attn.py::test_timm_block_paper_start_is_timms[ge]",),
    ),
    (
        TORCH < (2, 7),
        "torch 2.6 exports no lerp, addcmul or resizing of maps of any size to ONNX, and guards on what it need not",
        (
            "contracts/test_block_contract.py::test_block_compiles_exports_and_scripts[residual",
            "contracts/test_block_deployment.py::test_block_onnx_equal_at_other_sizes",
            "test_dual.py::test_dual_options_compile_and_export",
            "test_non_local.py::test_non_local_exports_with_any_size",
            "test_non_local.py::test_non_local_compiles_once_for_sizes",
            "test_residual_attention.py::test_mask_exports_by_every_exporter",
        ),
    ),
    (
        TORCH < (2, 7),
        "torch.compile of 2.6 sets no attributes on tensors, which carry a gate through a span",
        ("test_spans.py::test_span_compiles_exports_and_pickles",),
    ),
    (
        TORCH < (2, 7),
        "torch.export of 2.6 does not find the running mean of a block that a bare layer hosts",
        ("test_surgery.py::test_surgery_compiles_scripts_exports[vgg11]",),
    ),
    (
        TORCH < (2, 7),
        "torch and safetensors say it in other words there",
        (
            "test_checkpoint.py::test_read_never_runs_a_plain_pickle",
            "test_checkpoint.py::test_read_of_damaged_file_says_so[weights.safetensors",
        ),
    ),
)


def reasons_to_skip(test: str) -> Iterator[str]:
    """Why the test of that id cannot pass with the versions here, if so."""
    for lacking, reason, tests in LACKS:
        if lacking and test.removeprefix("tests/").startswith(tests):
            yield reason
