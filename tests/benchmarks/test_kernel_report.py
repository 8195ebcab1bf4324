"""The compile report: what it reads from assembly, what it complains about, and the library's pinned kernels.

Compiling needs a process in which Triton does not interpret: the script runs as a user runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report.assembly import amd_accesses, half_dots, ptx_accesses, tensor_cores
from report.case import CASE_FILES
from report.roofline import DEVICES, bound_us

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "kernel_report.py"
SAMPLES = Path(__file__).with_name("sample_cases.py")

PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .u64 .ptr .global .align 1 k_param_2
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_2];
	ld.param.s32 	%rd3, [k_param_1];
	mad.wide.u32 	%rd4, %r1, 2, %rd1;
$L1:
	add.s64 	%rd6, %rd5, 64;
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd6 + 16 ], 0x10, %r7;
	mov.b64 	%rd5, %rd6;
	selp.b64 	%rd5, %rd4, %rd5, %p2;
	ld.global.L1::evict_last.b16 { %rs1 }, [ %rd7 + 0 ];
	add.s64 	%rd7, %rd2, %rd3;
	@%p3 st.global.v2.b32 [ %rd7 + 0 ], { %r8, %r9 };
	@%p3 atom.global.gpu.acq_rel.add.f32 %r10, [ %rd7 + 0 ], %r11;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%r94}, %rd34, %rd35, %p5, 1, 1, 0, 0;
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=given, capture_output=True, text=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and printed text of the sample cases on two targets."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    done = run("--cases", str(SAMPLES), "--target", "sm_90", "gfx942", "--json", str(out))
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


class TestReading:
    def test_accesses_are_led_back_to_their_arguments_through_loops(self) -> None:
        assert ptx_accesses(PTX, ["x", "n", "y"]) == {
            "load": {"x": {128: 2}, "y": {16: 1}},
            "store": {"y": {64: 1}},
            "atomic": {"y": {32: 1}},
        }

    def test_an_access_of_unknown_origin_is_not_swept_under_the_carpet(self) -> None:
        with pytest.raises(ValueError, match="%rd9"):
            ptx_accesses("ld.global.b32 { %r1 }, [ %rd9 + 0 ];", [])

    def test_amd_widths(self) -> None:
        text = "buffer_load_dwordx4 v[0:3]\nglobal_load_ushort v1\nbuffer_store_short v1\nglobal_store_dwordx2 v1"
        assert amd_accesses(text) == {"load": {"all": {128: 1, 16: 1}}, "store": {"all": {16: 1, 64: 1}}, "atomic": {}}

    def test_matrix_instructions_and_half_dots(self) -> None:
        assert tensor_cores(PTX) == {"HGMMA": 1}
        assert tensor_cores("v_mfma_f32_32x32x8_f16 a\nv_mfma_f32_32x32x8_f16 b") == {"mfma_f32_32x32x8_f16": 2}
        ir = "tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64x{}> * tensor<64x16x{}> -> tensor<64x16xf32>"
        assert [half_dots(ir.format(kind, kind)) for kind in ("f16", "bf16", "f32")] == [1, 1, 0]

    def test_the_longer_of_memory_and_compute_binds(self) -> None:
        assert bound_us(DEVICES["sm_80"], 2039 * 10**6, 0, 16) == (pytest.approx(1000.0), "memory")
        assert bound_us(DEVICES["sm_80"], 2039 * 10**6, 624 * 10**9, 16) == (pytest.approx(2000.0), "compute")


class TestSamples:
    def test_every_fault_is_named_and_nothing_else(self, samples: tuple[int, dict[str, Any], str]) -> None:
        status, report, text = samples
        assert status == 1
        found = {(line.split()[1], "unaligned" in line or "bits" in line) for line in report["problems"]}
        assert found == {("sm_90", True), ("sm_90", False), ("gfx942", False)}
        assert sum("spills" in line for line in report["problems"]) == 2
        assert all(f"PROBLEM {line}" in text for line in report["problems"])

    def test_a_specialisation_is_measured_once(self, samples: tuple[int, dict[str, Any], str]) -> None:
        kernels = [one for one in samples[1]["kernels"] if one["target"] == "sm_90"]
        assert [one["kernel"] for one in kernels].count("scaled_product_kernel") == 2  # float16 and float32
        shared = next(one for one in kernels if one["pointers"].get("w_ptr") == "fp16")
        assert shared["cases"] == ["product", "the same again"]

    def test_halves_use_tensor_cores_and_single_precision_stays_exact(self, samples: Any) -> None:
        cores = {
            (one["target"], one["pointers"]["x_ptr"]): set(one["tensor_cores"])
            for one in samples[1]["kernels"]
            if one["kernel"] == "scaled_product_kernel"
        }
        assert cores["sm_90", "fp16"] == {"HGMMA"}
        assert cores["sm_90", "fp32"] == set()  # ieee: no tf32
        assert all(name.startswith("mfma") for name in cores["gfx942", "fp16"])

    def test_alignment_is_that_of_the_view(self, samples: tuple[int, dict[str, Any], str]) -> None:
        copies = [one for one in samples[1]["kernels"] if one["kernel"] == "copy_kernel" and one["target"] == "sm_90"]
        widths = {one["pointers"]["x_ptr"]: one["accesses"]["load"]["x_ptr"] for one in copies}
        assert widths == {"fp16": {"128": 1}, "fp16 unaligned": {"16": 8}}

    def test_launches_and_programs(self, samples: tuple[int, dict[str, Any], str]) -> None:
        cases = {one["name"]: one["launches"] for one in samples[1]["cases"]}
        assert cases["product"] == [["scaled_product_kernel", 64]]
        assert cases["aligned copy"] == [["copy_kernel", 4]]

    def test_bytes_are_counted_where_a_case_asks_for_it(self, samples: tuple[int, dict[str, Any], str]) -> None:
        counts = {one["name"]: (one["asked"], one["unique"], one["least"]) for one in samples[1]["cases"]}
        assert counts["aligned copy"] == (16384, 16384, 16384)
        assert counts["product"] == (None, None, counts["product"][2])


def test_it_refuses_to_run_interpreted() -> None:
    done = run("--cases", str(SAMPLES), TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_a_stream_that_no_kernel_has_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "cases_wrong.py"
    wrong.write_text(SAMPLES.read_text().split("CASES = [")[0] + 'CASES = [Case("w", "w", copy, 1, streams=("z",))]')
    done = run("--cases", str(wrong), "--target", "sm_90")
    assert done.returncode != 0
    assert "no kernel has the streams ['z']" in done.stderr


def test_the_librarys_pinned_kernels(tmp_path: Path) -> None:
    """No spills, 128-bit accesses on the main streams, tensor cores for every half-precision dot: all four targets."""
    out = tmp_path / "report.json"
    done = run("--pinned", "--no-counts", "--json", str(out))
    assert out.exists(), done.stderr
    report = json.loads(out.read_text())
    assert report["problems"] == []
    assert done.returncode == 0
    kernels = report["kernels"]
    assert {one["target"] for one in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {one["op"] for one in kernels} == {path.stem.removeprefix("cases_") for path in CASE_FILES}
    checked = [name for one in kernels if one["target"] == "sm_90" for name in one["streams"]]
    assert checked  # the widths were looked at
