"""transformers loads what `mmx convert --to hf` writes: every key, and the same logits.

transformers and torch are no dependency of this project. `make transformers` gives them an
environment of their own beside it and runs this; without that environment it is left out. The
golden cases hold logits that transformers computed from the checkpoint before conversion.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import convert
from golden_cases import FOLDER, LOGITS, NAMES, golden

PYTHON = Path(__file__).parents[1] / ".venv-transformers" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with transformers; `make transformers` makes it"
)
CASES = [name for name in NAMES if name.startswith("text/")]
WAYS = {
    "through Orbax": lambda source, work: convert(
        convert(source, work / "orbax", "--to", "orbax"), work / "back", "--to", "hf"
    ),
    "in many files": lambda source, work: convert(
        source, work / "many", "--to", "hf", "--shard-size", "20KB"
    ),
    "fused experts": lambda source, work: convert(
        source, work / "fused", "--to", "hf", "--experts", "fused"
    ),
    "from the released form": lambda source, work: convert(
        convert(source, work / "released", "--to", "hf-released"), work / "again", "--to", "hf"
    ),
}

READ = """
import json, sys
import numpy as np, torch, transformers

for folder, inputs, output in json.load(sys.stdin):
    model, info = transformers.MiniMaxForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32,
        experts_implementation="eager",  # torch's grouped product wants wider rows than these
    )
    arrays = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    with torch.no_grad():
        logits = model.eval()(arrays["tokens"], attention_mask=arrays.get("mask")).logits
    np.save(output, logits.numpy())
    print(json.dumps({kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What transformers, in one process, says of every output: (ill-fitting keys, logits)."""
    jobs, names = [], []
    for name in CASES:
        work = tmp_path_factory.mktemp("it")
        case = golden(name)
        arrays: dict[str, Any] = {"tokens": case.tokens.astype(np.int64)}
        if case.mask is not None:
            arrays["mask"] = case.mask.astype(np.int64)
        np.savez(work / "inputs.npz", **arrays)
        for way, make in WAYS.items():
            folder = make(FOLDER / name, work)
            jobs.append([str(folder), str(work / "inputs.npz"), f"{folder}.npy"])
            names.append((name, way))
    done = subprocess.run(
        [PYTHON, "-c", READ], input=json.dumps(jobs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    logits = [np.load(output) for _, _, output in jobs]
    return dict(zip(names, zip(said, logits, strict=True), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_output(name, way, read):
    """Two of the cases hold no decay tables, so these are computed."""
    ill_fitting, logits = read[name, way]
    assert not ill_fitting
    case = golden(name)
    recorded = case.arrays["logits"]
    kept = recorded.shape[1]  # of long inputs only the last positions are recorded
    real = case.real[:, -kept:]
    np.testing.assert_allclose(logits[:, -kept:][real], recorded[real], rtol=0, atol=LOGITS)
