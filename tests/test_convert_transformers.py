"""transformers loads what `mmx convert --to hf` writes: every key, and the same logits.

transformers and torch are no dependency of this project; where they are installed beside it, this
runs. The golden cases hold logits that transformers computed from the checkpoint before conversion.
"""

import numpy as np
import pytest
from golden_cases import FOLDER, LOGITS, NAMES, golden

from mmx.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("text/")])
def test_transformers_reads_the_output(name, tmp_path):
    """Through Orbax and back; two of the cases hold no decay tables, so these are computed."""
    orbax, output = tmp_path / "orbax", tmp_path / "hf"
    assert main(["convert", str(FOLDER / name), str(orbax), "--to", "orbax"]) == 0
    assert main(["convert", str(orbax), str(output), "--to", "hf"]) == 0
    model, info = transformers.MiniMaxForCausalLM.from_pretrained(
        output, output_loading_info=True, dtype=torch.float32,
        experts_implementation="eager",  # torch's grouped product wants wider rows than these
    )  # fmt: skip
    assert not {kind: keys for kind, keys in info.items() if keys}
    case = golden(name)
    mask = None if case.mask is None else torch.from_numpy(case.mask.astype(np.int64))
    with torch.no_grad():
        tokens = torch.from_numpy(case.tokens.astype(np.int64))
        logits = model.eval()(tokens, attention_mask=mask).logits.numpy()
    recorded = case.arrays["logits"]
    kept = recorded.shape[1]  # of long inputs only the last positions are recorded
    real = case.real[:, -kept:]
    np.testing.assert_allclose(logits[:, -kept:][real], recorded[real], rtol=0, atol=LOGITS)
