"""What compilers say of a plan: their refusals, and the way there for GPUs that are not here."""

import dataclasses
import re

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_plan import ask

import mmx
from mmx.cli import main
from mmx.planning import aot
from mmx.planning.lowering import lower_request
from pallas_kernels import platform
from pallas_kernels.lightning_attention import gpu_hopper

# ---------------------------------------------------------------- refusals of libtpu

# Of libtpu 0.0.48.1: a kernel named too_large_blocks that doubles its input, 512 fp32 a row, with
# blocks of 8192 rows on a v5e, 16384 on a v5p and 65536 on a v5e; then one that has no name.
SCOPED = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem "
    "while allocating on stack for %too_large_blocks.1 = f32[32768,512]{1,0:T(8,128)} "
    'custom-call(%x_ref.1), custom_call_target="tpu_custom_call", operand_layout_constraints='
    "{f32[32768,512]{1,0}}, frontend_attributes={kernel_metadata={}}, metadata={op_name="
    '"jit(<lambda>)/too_large_blocks/pallas_call" stack_frame_id=2}. Scoped allocation with size '
    "64.00M and limit 16.00M exceeded scoped vmem limit by 48.00M. It should not be possible to "
    "run out of scoped vmem - \nSee https://openxla.org/xla/errors/error_1001 for more details."
)
CAPACITY = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. "
    "Used 128.00M of 63.94M vmem. Exceeded vmem capacity by 64.06M.\n\nProgram vmem requirement "
    "128.00M:\n    scoped          128.00M\n\n  Largest program allocations in vmem:\n\n  1. Size: "
    '64.00M\n     Operator: op_name="jit(<lambda>)/too_large_blocks/pallas_call"\n     Shape: '
    "u8[67108864]{0}\n     Unpadded size: 64.00M\n     Tag: input window allocation for operator "
    "input 0. The window shape is f32[16384,512], while the full shape is f32[65536,512]. The u8 "
    "shape/size shown above represents the raw byte size of this window in VMEM. This allocation "
    "has 2 buffering levels.\n     XLA label: too_large_blocks.1 = custom-call(x_ref.1), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={f32[65536,512]{1,0}}, '
    "frontend_attributes={kernel_metadata={}}\n     Allocation type: scoped\n"
)
ALLOCATION = (
    "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: "
    "#allocation3 [shape = 'u8[268435456]{0}', space=vmem, size = 0x10000000, scoped, tag = 'input "
    "window allocation for operator input 0. The window shape is f32[65536,512], while the full "
    "shape is f32[262144,512]. The u8 shape/size shown above represents the raw byte size of this "
    "window in VMEM. This allocation has 2 buffering levels.'] :: too_large_blocks.1"
)
# A cumulative sum of 10.5 GiB on a v5e, argument and result among what is required.
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(45.00G) exceeds available HBM (15.75G). HLO module: jit__lambda."
)
WHERE = "vector memory (VMEM) overflows in the kernel too_large_blocks: "


@pytest.mark.parametrize(
    ("message", "reason", "needed"),
    [
        (SCOPED, WHERE + "64.00M wanted of 16.00M", 0),
        (
            CAPACITY,
            WHERE + "128.00M wanted of 63.94M, the input window f32[16384,512] among it",
            0,
        ),
        (
            ALLOCATION,
            WHERE + "256.00M wanted of 128.00M, the input window f32[65536,512] among it",
            0,
        ),
        (TEMPORARIES, "HBM is too small: " + TEMPORARIES, 45 * 2**30),
    ],
)
def test_what_libtpu_refuses_is_said_in_one_line(message, reason, needed):
    assert aot.out_of_memory(RuntimeError(message))
    said = " ".join(message.split())
    assert aot._reason(said) == reason
    assert aot._needed(said) == needed


def test_a_refusal_for_vector_memory_is_a_plan_that_does_not_fit(monkeypatch, tmp_path, capsys):
    """The kernel is named; the bytes of HBM stay those of the estimate."""
    refused = aot.Compiled(1.0, failure=aot._reason(SCOPED), needed=aot._needed(SCOPED))
    monkeypatch.setattr(aot, "compile_request", lambda request: refused)
    options = ("--mode", "prefill", "--topology", "v5e:1x1", "--seq", "64")
    assert main(["plan", "tiny", *options, "--json", str(tmp_path / "plan.json")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "it does not compile: " + WHERE + "64.00M wanted of 16.00M" in said
    assert re.search(r"it does not fit(?! by)", said)


# ---------------------------------------------------------------- GPUs that are not here


def test_kernels_of_a_gpu_that_is_not_here_are_known_by_its_name():
    def seen(kind, name):
        device = AbstractDevice(platform=kind, device_kind=name, num_cores=None)
        mesh = AbstractMesh((1,), ("a",), (AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return platform.gpu_compute_capability()

    assert seen("gpu", "NVIDIA H200") == (9, 0)
    assert seen("gpu", "a GPU without kernels") is None
    assert seen("tpu", "TPU v5") is None
    assert platform.gpu_compute_capability() is None  # no mesh, and this is a CPU


def prompt(**changes):
    """A prompt of two layers, one of each kind, as the kernels of an H200 take it."""
    config = dataclasses.replace(
        mmx.preset("tiny"), layer_kinds=("lightning", "softmax"), chunk_size=64
    )
    return ask(config=config, mode="prefill", seq=128, **changes)


@pytest.mark.parametrize(("topology", "mesh"), [("h200:1", "fsdp=1"), ("h200:8", "expert=2")])
def test_a_program_is_lowered_with_the_kernels_of_its_gpus(topology, mesh):
    """One call of cuDNN for the softmax layer; of Pallas for lightning and for grouped products."""
    lowered = lower_request(prompt(topology=topology, mesh=mesh))
    assert lowered.failure is None
    assert lowered.kernels["cuDNN"] >= 1
    assert lowered.kernels["Pallas"] >= 2
    assert str(lowered).startswith("lowered for cuda with ")


def test_what_a_kernel_refuses_is_one_line_and_does_not_fit(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise NotImplementedError("lightning_hopper: a block of\n512 rows")

    # The first of the list is the one of Hopper.
    from pallas_kernels.lightning_attention import api

    first = dataclasses.replace(api.IMPLEMENTATIONS[0], call=refuse)
    assert first.unsupported is gpu_hopper.unsupported
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (first, *api.IMPLEMENTATIONS[1:]))
    options = ("--mode", "prefill", "--topology", "h200:1", "--seq", "64")
    assert main(["plan", "tiny", *options, "--quick"]) == 0
    capsys.readouterr()
    assert main(["plan", "tiny", *options]) == 1
    said = " ".join(capsys.readouterr().out.split())
    wanted = (
        "it does not lower for cuda: NotImplementedError: lightning_hopper: a block of 512 rows"
    )
    assert wanted in said
    assert "it does not fit" in said


def test_more_gpus_than_this_process_can_stand_for_are_refused():
    """The command makes room before it begins; a process that has its devices cannot."""
    with pytest.raises(ValueError, match=r"h200:8x2 has 16 devices and this process 8 .*jax_num"):
        lower_request(prompt(topology="h200:8x2", mesh="fsdp=16", batch=16))
