"""Tokens of a dVAE beside those of transformers' `FlavaImageCodebook`, with random weights."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers", reason="parity with FLAVA's codebook")

from mae_jax.interop.tokenizer_file import read_tokenizer  # noqa: E402
from mae_jax.models.dvae import DVAE  # noqa: E402
from mae_jax.models.targets.token import Token  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"hidden_size": 16, "vocab_size": 512}
REAL = {}


def codebook(sizes):
    """Theirs, with weights that give activations of about one everywhere."""
    torch.manual_seed(0)
    model = transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig(**sizes)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            fan_in = x[0].numel() if x.ndim == 4 else 100
            x.normal_(0, (2 / fan_in) ** 0.5 * (4 if "res_path" in name else 1))
    return model


@pytest.mark.parametrize(
    ("sizes", "images"), [(SMALL, 8), pytest.param(REAL, 6, marks=pytest.mark.slow)]
)
def test_codes_and_logits_of_a_file_are_transformers(sizes, images, tmp_path):
    theirs = codebook(sizes)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    shape, weights = read_tokenizer(tmp_path)
    encode = jax.jit(lambda w, x: DVAE(shape, 3).apply({"params": w}, x, method="encode"))
    assert shape == (theirs.vocab_size, theirs.hidden_size, 2, 0)
    pixels = np.random.default_rng(0).uniform(size=(images, 112, 112, 3)).astype(np.float32)
    x = torch.from_numpy((0.8 * pixels + 0.1).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs.blocks(x).permute(0, 2, 3, 1).numpy()
        codes = theirs.get_codebook_indices(x).numpy().reshape(images, -1)
    mapped = (0.8 * pixels + 0.1).astype(np.float32)
    logits = encode(weights, mapped)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    normalised = ((pixels - MEAN) / STD).astype(np.float32)
    target = Token(8, 3, shape, MEAN, STD)  # 8 pixels a patch: nothing is resized
    agree = np.mean(np.asarray(jax.jit(target.values)(normalised, weights)) == codes)
    assert agree >= 0.999
    assert len(np.unique(codes)) > 10  # not a constant
