"""The layout of the repository: files stay short, an op family has one stem in every folder, tests share by support."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 300  # lines
# By package, its modules without a test file of their name -> the file whose tests go through them. "": the modules
# beside the packages.
COVERED_BY: dict[str, dict[str, str]] = {
    "": {
        "_library": "ops/test_op_registration.py",
        "auto_channel_prune_search": "flows/test_channel_search.py",
        "backends": "devices/test_plugin_device.py",
        "distributed": "frameworks/test_fsdp.py",
        "errors": "flows/test_bad_input.py",
    },
    "checkpoint": {"amct_names_rnn": "checkpoint/test_amct_names.py"},
    "common": {"held_objects": "common/test_references.py"},
    "config": {
        "json_text": "config/test_config_json.py",
        "plan_checks": "config/test_plan.py",
        "traits": "graph/test_traits.py",
    },
    "explain": {
        "reasons": "explain/test_report.py",
        "sensitivity_report": "flows/test_sensitivity.py",
    },
    "export": {
        "axes": "export/test_export_files.py",
        "cleanup": "export/test_saved_files.py",
        "deploy": "export/test_write.py",
        "factors": "export/test_write.py",
        "fake_quant": "export/test_write.py",
        "flat_call": "graph/test_inputs.py",
        "fold_batchnorm": "export/test_write.py",
        "precision": "export/test_saved_files.py",
        "rnn": "export/test_rnn_files.py",
        "rnn_factors": "export/test_rnn_files.py",
        "scripted": "model_surgery/test_scripted_parts.py",
        "traced": "export/test_capture.py",
    },
    "flows": {
        "build": "flows/test_restore.py",
        "uncompressed_check": "flows/test_bad_input.py",
        "compressed": "flows/test_restore.py",
        "explain": "explain/test_report.py",
        "prune": "flows/test_prune_flow.py",
        "quant": "flows/test_quant_flow.py",
        "record": "model_surgery/test_record_factors.py",
        "saving": "flows/test_save.py",
    },
    "graph": {
        "onnx_names": "graph/test_trace.py",
        "operators": "prune/test_equivalence.py",
        "recorder": "graph/test_trace.py",
        "run": "graph/test_trace.py",
        "tensor_values": "graph/test_trace.py",
        "values": "graph/test_trace.py",
    },
    "layers": {
        "classes": "layers/test_derive.py",
        "conv_linear": "layers/test_compressed.py",
        "layer_refs": "layers/activation/test_shared_input.py",
        "lazy_tensor": "layers/products/test_deferred_tensor.py",
        "product_path": "layers/products/test_timing.py",
    },
    "layers/activation": {
        "quantizer": "layers/activation/test_shared_input.py",
        "calibration": "flows/test_calibrate.py",
        "types": "layers/activation/test_shared_input.py",
    },
    "layers/chains": {
        "batch_norm_chain": "layers/chains/test_chain_tensor.py",
        "chain_values": "layers/chains/test_chain_tensor.py",
        "forward_rules": "layers/chains/test_chain_tensor.py",
    },
    "layers/custom": {"folded_layer": "layers/custom/test_custom_forward.py"},
    "layers/products": {
        "deferred_conv": "layers/products/test_deferred_tensor.py",
        "path_choice": "layers/products/test_timing.py",
        "prepared_conv": "layers/products/test_prepared_forward.py",
        "prepared_weight": "layers/products/test_prepared_forward.py",
        "weight_sources": "layers/products/test_fingerprint.py",
    },
    "layers/recurrent": {},
    "layers/weight": {},
    "model_surgery": {
        "batchnorm_links": "layers/test_bn_fold.py",
        "range_averaging": "frameworks/test_distributed.py",
        "session": "model_surgery/test_copies.py",
        "split_attention": "layers/test_attention.py",
    },
    "ops": {
        "_activation_clips": "ops/test_activation_ulq.py",
        "_batch_norm": "ops/test_activation_batch_norm.py",
        "_arithmetic": "ops/test_op_properties.py",
        "_checks": "ops/test_op_registration.py",
        "_registration": "ops/test_op_registration.py",
    },
    "proto": {"descriptors": "proto/test_proto_text.py"},
    "prune": {
        "discovery": "prune/test_walk.py",
        "runs": "prune/test_equivalence.py",
        "search_space": "flows/test_channel_search.py",
    },
    "prune/rules": {
        "scaling": "prune/test_rescale.py",
        "types": "prune/rules/test_table.py",
    },
    "record": {
        "attributes": "record/test_record_text.py",
        "checks": "record/test_record_text.py",
        "types": "record/test_record_text.py",
    },
}
FAMILIES = ("activation_", "calibration_", "integer_", "sparsity_", "weight_")
OPS = sorted(path.stem for path in (ROOT / "amct_ext" / "ops").glob("*.py") if path.stem.startswith(FAMILIES))


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    """Of what git carries or would carry, without copies of other projects and generated files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("the files of the repository are listed by git: run the tests in a clone")
    for name in listed.stdout.splitlines():
        if name.endswith(suffixes) and "/vendor/" not in name and (ROOT / name).is_file():
            yield ROOT / name


def test_no_file_is_long() -> None:
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    lengths = {path: path.read_text().count("\n") for path in sources(suffixes=suffixes)}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_imports_from_another() -> None:
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    assert not [
        (path.name, module)
        for path in sources("tests")
        for module in imported(path)
        if module.rpartition(".")[2] in files
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_kernels_lie_in_a_file_named_like_their_reference(device: str) -> None:
    """`activation_ulq_state.cpp` counts: a kernel file may hold a part of what `ops/activation_ulq.py` has."""
    kernels = [
        path
        for path in sources(f"csrc/{device}", suffixes=(".cpp", ".cu"))
        if "TORCH_LIBRARY_IMPL(amct_ext" in path.read_text()
    ]
    assert kernels
    assert not [path.name for path in kernels if not path.stem.startswith(tuple(OPS))]


def test_every_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT / "amct_ext").as_posix() for path in sources("amct_ext")}
    assert folders - {"."} == COVERED_BY.keys() - {""}


@pytest.mark.parametrize("package", COVERED_BY, ids=lambda package: package or "amct_ext")
def test_modules_have_a_test_file_or_share_a_named_one(package: str) -> None:
    """`prune/check.py` is tested in `prune/test_check.py` or `prune/test_prune_check.py`."""
    folder = ROOT / "amct_ext" / package
    modules = {path.stem for path in sources(f"amct_ext/{package}") if path.parent == folder} - {"__init__"}
    tests = {path.name for path in (ROOT / "tests" / package).glob("test_*.py")}
    own = {stem for stem in modules if {f"test_{stem}.py", f"test_{Path(package).name}_{stem}.py"} & tests}
    shared = COVERED_BY[package]
    assert modules - own == set(shared)
    assert not [file for file in shared.values() if not (ROOT / "tests" / file).is_file()]
