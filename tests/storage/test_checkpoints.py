import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import UserError
from mae_jax.storage.checkpoints import Checkpoints, fingerprint, read_newest, steps_in
from mae_jax.train.state import TrainState


def state_at(step, sharding=None):
    tree = {
        "step": jnp.asarray(step, jnp.int32),
        "w": jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) + step,
        "b": jnp.full((8,), step, jnp.float32),
    }
    return tree if sharding is None else jax.device_put(tree, sharding)


def abstract(sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding),
        state_at(0),
    )


def accept(record):
    pass


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1, 2 and 3 on disk."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step), {"note": f"step {step}"})
    checkpoints.close()
    return tmp_path / "checkpoints"


def assert_restores(directory, step, sharding=None):
    checkpoints = Checkpoints(directory, keep=3)
    state, record = checkpoints.restore_newest(abstract(sharding), accept)
    assert record["note"] == f"step {step}"
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
    return checkpoints


def test_newest_checkpoint_comes_back_whole(three):
    assert_restores(three, 3)


def test_an_empty_directory_holds_nothing(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=1).restore_newest(abstract(), accept) is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state_at(step), {})
    checkpoints.wait()
    assert steps_in(tmp_path) == [3, 4]


def test_a_checkpoint_restores_onto_another_device_count(tmp_path):
    devices = np.asarray(jax.devices())
    eight = NamedSharding(Mesh(devices.reshape(8), "x"), P())
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state_at(3, eight), {"note": "step 3"})
    checkpoints.close()
    two = NamedSharding(Mesh(devices[:2], "x"), P())
    assert_restores(tmp_path, 3, two)


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(directory):
    file = largest_file(directory / "3" / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(directory):
    file = largest_file(directory / "3" / "state")
    data = bytearray(file.read_bytes())
    for position in range(len(data) // 3, len(data) // 3 + 64):
        data[position] ^= 0xFF
    file.write_bytes(bytes(data))


def remove_data(directory):
    largest_file(directory / "3" / "state").unlink()


def remove_record(directory):
    (directory / "3" / "record" / "metadata").unlink()


def garble_record(directory):
    (directory / "3" / "record" / "metadata").write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip_bits, remove_data, remove_record, garble_record])
def test_a_damaged_newest_checkpoint_is_passed_over_and_training_goes_on(three, damage):
    damage(three)
    checkpoints = assert_restores(three, 2)
    assert (three / "damaged-3").is_dir()
    checkpoints.save(3, state_at(3), {"note": "step 3"})
    checkpoints.close()
    assert_restores(three, 3)


@pytest.mark.parametrize("damage", [truncate, flip_bits, remove_data, remove_record, garble_record])
def test_other_readers_pass_over_it_with_a_note_and_move_nothing(three, damage):
    damage(three)
    state, record, notes = read_newest(three, ("w", "absent"))
    assert record["note"] == "step 2"
    np.testing.assert_array_equal(state["w"], state_at(2)["w"])
    assert state.keys() == {"w", "absent"}
    assert state["absent"] is None
    assert len(notes) == 1
    assert "checkpoint 3 is damaged and passed over" in notes[0]
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "3"]


def test_without_a_whole_checkpoint_readers_say_what_is_wrong_with_each(three):
    for step in (1, 2, 3):
        (three / str(step) / "record" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"no complete checkpoint.*3 is damaged.*1 is damaged"):
        read_newest(three, ("w",))


def test_fingerprints_of_version_0_1_are_lists_in_the_order_of_the_state(tmp_path):
    state = TrainState(
        step=jnp.asarray(7, jnp.int32),
        params={"b": jnp.ones(3), "a": jnp.arange(4.0)},
        opt_state=optax.adam(0.1).init({"a": jnp.zeros(4), "b": jnp.full(3, 2.0)}),
        ema=None,
        frozen={"e": jnp.full(5, 0.5)},
    )
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 7):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        for step, change in ((1, 0), (7, 1)):
            file = tmp_path / str(step) / "record" / "metadata"
            record = json.loads(file.read_text())
            record["fingerprint"] = np.asarray(fingerprint(state)).tolist()
            record["fingerprint"][-1] += change
            file.write_text(json.dumps(record))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert read_newest(tmp_path, ("step", "params"))[2] == []  # which were not changed
    _, _, notes = read_newest(tmp_path, ("params", "frozen"))
    assert notes == [
        "checkpoint 7 is damaged and passed over (1 tensor(s) changed on disk, first frozen/e)"
    ]
    restored, _ = Checkpoints(tmp_path, keep=2).restore_newest(abstract, accept)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert (tmp_path / "damaged-7").exists()


def test_a_half_written_checkpoint_is_not_taken_for_whole(three):
    (three / "3").rename(three / "4.orbax-checkpoint-tmp")
    assert_restores(three, 2)


def test_when_every_checkpoint_is_damaged_nothing_starts_over_silently(three):
    for step in (1, 2, 3):
        largest_file(three / str(step) / "state").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the checkpoints \[1, 2, 3\]"):
            Checkpoints(three, keep=3).restore_newest(abstract(), accept)
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "3"]


def test_a_run_begins_only_where_no_trace_of_one_is(tmp_path):
    def begin(*traces):
        Checkpoints(tmp_path, keep=1).begin(traces)

    with pytest.raises(UserError, match=r"under way before \(metrics\)"):
        begin("metrics")
    begin()
    begin("metrics")  # of a run that died before its first checkpoint
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, state_at(1), {})
    with pytest.raises(UserError, match=r"under way before \(metrics\)"):
        begin("metrics")
    begin()
    (tmp_path / "damaged-1").mkdir()
    with pytest.raises(UserError, match=r"under way before \(damaged-1\)"):
        begin()


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(three):
    def refuse(record):
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        Checkpoints(three, keep=3).restore_newest(abstract(), refuse)
    assert_restores(three, 3)


def test_a_part_that_is_absent_need_not_be_in_the_file(three):
    """Nor does one in the file that was absent: older programs know fewer parts, or more."""
    wider = abstract() | {"later": None}
    state, _ = Checkpoints(three, keep=3).restore_newest(wider, accept)
    assert state["later"] is None
    np.testing.assert_array_equal(state["w"], state_at(3)["w"])
    checkpoints = Checkpoints(three.with_name("other"), keep=1)
    checkpoints.save(1, state_at(1) | {"earlier": None}, {"note": "step 1"})
    checkpoints.close()
    assert_restores(three.with_name("other"), 1)


def test_a_whole_checkpoint_of_other_tensors_is_refused_by_name_and_left_alone(three):
    other = abstract()
    other["head"] = {"kernel": other.pop("b")}
    with pytest.raises(UserError, match=r"missing \(head/kernel, .*unexpected \(b, "):
        Checkpoints(three, keep=3).restore_newest(other, accept)
    assert_restores(three, 3)


def test_a_save_that_cannot_be_written_says_what_is_left(three, monkeypatch):
    checkpoints = Checkpoints(three, keep=5)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"No space left(.|\n)*\[1, 2, 3\](.|\n)*Make room"):
        checkpoints.save(4, state_at(4), {})


def test_fingerprint_changes_with_any_bit_and_not_with_the_layout():
    state = state_at(5)
    devices = np.asarray(jax.devices())
    split = jax.device_put(state["w"], NamedSharding(Mesh(devices, "x"), P("x")))
    changed = state["w"].at[13, 7].set(np.nextafter(state["w"][13, 7], np.float32(np.inf)))
    assert fingerprint(state["w"]) == fingerprint(split)
    assert fingerprint(state["w"]) != fingerprint(changed)
    expected = np.asarray(state["w"]).view(np.uint32).sum(dtype=np.uint32)
    assert fingerprint(state["w"])[0] == expected
