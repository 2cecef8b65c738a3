"""Files of tokenizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dvae_weights import random_dvae

from mae_jax import UserError
from mae_jax.interop.tensor_files import read_tensors, save_safetensors
from mae_jax.interop.tokenizer_file import TOKENIZER_FILE, read_tokenizer, write_tokenizer
from mae_jax.models.dvae import DVAE, DVAEShape, decoder_macs, encoder_macs

SHAPE = DVAEShape(codes=32, width=8, blocks=1, decoder=1)


@pytest.fixture
def file(tmp_path):
    write_tokenizer(random_dvae(SHAPE), tmp_path / "export" / TOKENIZER_FILE)
    return tmp_path / "export" / TOKENIZER_FILE


def test_a_tokenizer_is_read_back_from_file_folder_and_workdir(file):
    for path in (file, file.parent, file.parent.parent):
        shape, weights = read_tokenizer(path)
        assert shape == SHAPE
        jax.tree.map(np.testing.assert_array_equal, weights, random_dvae(SHAPE))


def test_names_are_flavas(file):
    names = read_tensors(file)[0]
    encoder = {name for name in names if not name.startswith("decoder.")}
    assert "blocks.group_2.group.block_1.res_path.path.conv_4.weight" in encoder
    assert {"blocks.input.bias", "blocks.output.conv.weight"} < encoder
    assert names["blocks.input.weight"].shape == (8, 3, 7, 7)


def test_dalle_s_own_spelling_is_read(file):
    tensors = {
        name.replace(".group.", ".").replace(".path.", ".").replace("weight", "w"): x
        for name, x in read_tensors(file)[0].items()
    }
    tensors = {
        name.removesuffix("bias") + "b" * name.endswith("bias"): x for name, x in tensors.items()
    }
    assert "blocks.group_1.block_1.res_path.conv_1.w" in tensors
    save_safetensors(file, tensors, {})
    jax.tree.map(np.testing.assert_array_equal, read_tokenizer(file)[1], random_dvae(SHAPE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.output.conv.weight"), "holds no dVAE"),
        (lambda t: t.update(other=np.zeros(3)), "holds no dVAE"),
        (lambda t: t.pop("blocks.group_3.group.block_1.id_path.bias"), "group_3_block_1/id_path"),
        (lambda t: t["blocks.input.bias"].fill(np.nan), "NaN"),
    ],
)
def test_what_is_no_whole_dvae_is_refused(file, change, message):
    tensors = {name: np.array(x) for name, x in read_tensors(file)[0].items()}
    change(tensors)
    save_safetensors(file, tensors, {})
    with pytest.raises(UserError, match=message):
        read_tokenizer(file)


def test_a_missing_file_and_other_channels_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tokenizer(tmp_path / "absent.bin")
    with pytest.raises(UserError, match=r"3 channel\(s\), model.channels = 4"):
        read_tokenizer(file, 4)


def test_dalle_s_encoder_has_the_published_size_and_work():
    x = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(DVAE(DVAEShape(), 3).init, jax.random.key(0), x)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 53_786_240
    assert encoder_macs(DVAEShape(), 3, 112, 112) == pytest.approx(26.06e9, rel=1e-3)


def test_work_is_what_the_compiler_counts():
    shape = DVAEShape(codes=16, width=8, blocks=2, decoder=1)
    weights, dvae = random_dvae(shape), DVAE(shape, 3)

    def counted(method, *inputs):
        run = jax.jit(lambda x: dvae.apply({"params": weights}, x, method=method))
        return run.lower(jnp.zeros(inputs)).compile().cost_analysis()["flops"] / 2

    # The compiler counts additions too, and no products with the border's zeros.
    assert counted("encode", 1, 64, 64, 3) == pytest.approx(encoder_macs(shape, 3, 64, 64), rel=0.1)
    assert counted("decode", 1, 8, 8, 16) == pytest.approx(decoder_macs(shape, 3, 64, 64), rel=0.1)
