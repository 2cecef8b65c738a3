"""The probe while pretraining, on a small encoder and pictures whose colour tells their class."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import UserError
from mae_jax.config import default_config
from mae_jax.data.record import DecodeError, Record
from mae_jax.data.splits import Splits
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.mesh import make_mesh, place
from mae_jax.distributed.sharding import abstract_state, gather_params, shardings_of
from mae_jax.evaluators import online_probe as probe_module
from mae_jax.evaluators.online_probe import Probe
from mae_jax.evaluators.probes import knn_accuracy, ridge_probe
from mae_jax.models.classifier import pool_tokens
from mae_jax.models.patches import normalize
from mae_jax.models.vit import ViT
from mae_jax.tasks.pretrain import probe_options
from mae_jax.train.metrics import MetricsWriter, read_metrics
from mae_jax.train.state import create_state

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = 4


class Pictures:
    """Noise of a mean that depends on the class, in memory, sorted by class."""

    num_classes, class_names = CLASSES, None

    def __init__(self, name="pictures", split="train", count=60, labels=None, broken=()):
        self.name, self.split, self.broken = name, split, broken
        self.labels = np.arange(count) * CLASSES // count if labels is None else labels
        self.reads = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads.append(index)
        rng = np.random.default_rng([index, self.split == "train"])
        label = int(self.labels[index])
        noise = rng.normal(size=(20, 16, 3)) * 60 + 110 + 12 * label
        pixels = noise.clip(0, 255).astype(np.uint8)
        image = b"broken" if index in self.broken else pixels
        return Record(image, label, f"{self.name}/{self.split}#{index}")


class SmallTask:
    """What the probe asks of a task, around a ViT of two blocks."""

    image_shape = (16, 16, 3)
    eval_batch_size = 16

    def __init__(self, mesh, seed=0):
        self.mesh, self.seed = mesh, seed
        self.encoder = ViT((16, 16), 8, 3, width=32, depth=2, heads=2)

    def init(self):
        key = jax.random.key(self.seed)
        params = self.encoder.init(key, jnp.zeros((1, *self.image_shape)))["params"]
        return create_state({"encoder": params}, optax.adam(1e-3), keep_ema=True)

    def encode(self, params, images):
        params = gather_params(params["encoder"], self.mesh, jnp.float32)
        x = normalize(images, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        return self.encoder.apply({"params": params}, x)

    def state(self):
        """The state of another seed, laid out over the mesh."""
        return place(initial_state(seed=5), shardings_of(abstract_state(self.init, self.mesh)))


@functools.cache
def initial_state(seed=0):
    return jax.device_get(jax.jit(SmallTask(None, seed).init)())


@functools.cache
def encoder():
    """The encoder on one device."""
    return jax.jit(SmallTask(make_mesh(1, devices=jax.devices()[:1])).encode)


class Writer:
    def __init__(self):
        self.lines = []

    def write(self, step, scalars):
        self.lines.append({"step": step, **scalars})


def config_of(**fields):
    config = default_config()
    config.model.image_size = (16,)
    config.data.update(name="pictures", dir="somewhere", threads=1)
    config.probe.update(every=1, train_examples=1000, eval_examples=1000)
    config.update_from_flattened_dict(fields)
    return config


def make_probe(config, task, writer):
    """The probe that `config` describes, as pretraining makes it."""
    splits = Splits(
        *(None, None, None, EvalTransform(size=(16, 16), channels=3)),
        **{"seed": config.seed, "batch_size": 16, "classes": None, "threads": 1},
        bad_records=config.data.bad_records,
    )
    return Probe(task, splits, writer, **probe_options(config))


@pytest.fixture
def sources(monkeypatch):
    """The two splits; tests may put others in their place."""
    splits = {"train": Pictures(count=60), "validation": Pictures(split="validation", count=40)}
    monkeypatch.setattr(probe_module, "open_source", lambda name, directory, split: splits[split])
    return splits


def features_by_hand(params, source, pool="cls"):
    """Of every picture that can be decoded, one at a time."""
    transform = EvalTransform(size=(16, 16), channels=3)
    good = [i for i in range(len(source)) if i not in source.broken]
    tokens = [encoder()(params, transform.image(source[i])[None]) for i in good]
    return np.asarray(pool_tokens(jnp.concatenate(tokens), pool)), source.labels[good]


def probe_by_hand(params, sources, function=ridge_probe, pool="cls", **options):
    train, evaluation = (features_by_hand(params, sources[s], pool) for s in sources)
    return function(*train, *evaluation, CLASSES, **options)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_probe_is_the_closed_form_on_features_of_whole_pictures(sources, pool):
    # 60 and 40 examples in batches of 16: the last ones are padded.
    task, writer = SmallTask(make_mesh()), Writer()
    state = task.state()
    make_probe(config_of(**{"probe.pool": pool}), task, writer)(7, state)
    [line] = writer.lines
    top1 = probe_by_hand(initial_state(seed=5).params, sources, pool=pool)
    untrained = probe_by_hand(initial_state().params, sources, pool=pool)
    assert 1 / CLASSES < top1 < 1
    assert line == {
        "step": 7,
        "probe/top1": top1,
        "probe/top1_untrained": untrained,
        "probe/train_examples": 60,
        "probe/eval_examples": 40,
        "probe/classes": CLASSES,
    }


def test_the_average_of_the_weights_is_probed_where_one_is_kept(sources):
    task, writer = SmallTask(make_mesh()), Writer()
    state = task.state()
    worthless = jax.tree.map(jnp.zeros_like, state.params)
    probe = make_probe(config_of(), task, writer)
    probe(1, state.replace(params=worthless))
    probe(2, state.replace(ema=worthless))
    assert writer.lines[0]["probe/top1"] == probe_by_hand(initial_state(seed=5).params, sources)
    assert writer.lines[1]["probe/top1"] == 1 / CLASSES


def test_the_untrained_encoder_is_that_of_the_seed_and_is_probed_once(sources):
    task, writer = SmallTask(make_mesh()), Writer()
    calls = []
    encode = task.encode
    task.encode = lambda params, images: calls.append(1) or encode(params, images)
    probe = make_probe(config_of(), task, writer)
    untrained = probe_by_hand(initial_state().params, sources)
    ran = []
    compiled = probe._run._function
    probe._run._function = lambda *inputs: ran.append(1) or compiled(*inputs)
    for step in (1, 2, 3):
        probe(step, task.state())
    assert [line["probe/top1_untrained"] for line in writer.lines] == [untrained] * 3
    assert len(calls) == 1  # traced, and so compiled, once for all weights and both parts
    assert len(ran) == (3 + 1) * (4 + 3)  # batches of 16


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_mesh_that_splits_parameters_gives_the_same(sources, fsdp):
    task, writer = SmallTask(make_mesh(-1, fsdp)), Writer()
    state = task.state()
    make_probe(config_of(), task, writer)(1, state)
    assert writer.lines[0]["probe/top1"] == probe_by_hand(initial_state(seed=5).params, sources)


def test_neighbours_are_asked_where_the_config_says_so(sources):
    task, writer = SmallTask(make_mesh()), Writer()
    state = task.state()
    make_probe(config_of(**{"probe.neighbours": 7}), task, writer)(1, state)
    expected = probe_by_hand(initial_state(seed=5).params, sources, knn_accuracy, k=7)
    assert writer.lines[0]["probe/knn"] == expected


def chosen(config, sources):
    """Records of the training split that are looked at."""
    task = SmallTask(make_mesh())
    probe, source, state = make_probe(config, task, Writer()), sources["train"], task.state()
    source.reads.clear()
    probe(1, state)
    return set(source.reads)


def test_a_selection_is_spread_over_a_split_sorted_by_class_and_fixed_by_the_seed(sources):
    sources["train"] = Pictures(count=6000)
    config = config_of(**{"probe.train_examples": 400})
    records = chosen(config, sources)
    assert len(records) == 400
    counts = np.bincount(sources["train"].labels[list(records)], minlength=CLASSES)
    # Binomial around 100 with a deviation of 8.7, as 400 records drawn blindly.
    assert np.abs(counts - 100).max() < 4 * 8.7
    assert chosen(config, sources) == records
    assert chosen(config_of(**{"probe.train_examples": 400, "seed": 1}), sources) != records


def test_a_split_smaller_than_asked_for_is_used_once_over(sources):
    assert chosen(config_of(), sources) == set(range(60))


def test_small_parts_are_decoded_once_and_large_ones_each_time(sources, monkeypatch):
    task, state = SmallTask(make_mesh()), SmallTask(make_mesh()).state()

    def reads(config):
        writer = Writer()
        probe = make_probe(config, task, writer)
        sources["train"].reads.clear()
        probe(1, state)
        probe(2, state)
        first, second = (line["probe/top1"] for line in writer.lines)
        return first, second, len(sources["train"].reads)

    first, second, count = reads(config_of())
    assert (first == second, count) == (True, 60)
    monkeypatch.setattr(probe_module, "CACHE_BYTES", 16 * 16 * 3 * (64 + 48) - 1)
    assert reads(config_of()) == (first, first, 3 * 60)  # the untrained encoder's pass as well


def test_each_empty_field_takes_that_of_the_training_data(monkeypatch):
    asked = []

    def open_source(name, directory, split):
        asked.append((name, directory, split))
        return Pictures(name, split)

    monkeypatch.setattr(probe_module, "open_source", open_source)
    task = SmallTask(make_mesh())
    make_probe(config_of(), task, Writer())
    make_probe(config_of(**{"probe.name": "labelled", "probe.eval_split": "test"}), task, Writer())
    make_probe(
        config_of(**{"probe.dir": "there", "probe.train_split": "train[:9]"}), task, Writer()
    )
    assert asked == [
        ("pictures", "somewhere", "train"),
        ("pictures", "somewhere", "validation"),
        ("labelled", "somewhere", "train"),
        ("labelled", "somewhere", "test"),
        ("pictures", "there", "train[:9]"),
        ("pictures", "there", "validation"),
    ]


def unlabelled(sources):
    sources["train"].num_classes = None


def without_label(sources):
    sources["validation"] = Pictures(split="validation", labels=np.full(40, -1))


def other_classes(sources):
    sources["validation"].num_classes = CLASSES + 1


def other_names(sources):
    sources["train"].class_names, sources["validation"].class_names = list("abcd"), list("abce")


def one_class(sources):
    for source in sources.values():
        source.num_classes, source.labels = 1, source.labels * 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlabelled, "probe.name: pictures, split train, has no labels"),
        (without_label, r"probe.eval_split: pictures/validation#0 has the label -1"),
        (other_classes, "probe.eval_split: validation has 5 classes, train has 4"),
        (other_names, "validation has 4 classes, train has 4; in one of them only: d, e"),
        (one_class, "has 1 class;"),
    ],
)
def test_data_a_probe_cannot_use_is_refused_before_the_run(sources, change, message):
    change(sources)
    with pytest.raises(UserError, match=message):
        make_probe(config_of(), SmallTask(make_mesh()), Writer())


def test_data_that_is_not_there_is_told_with_the_fields_of_the_probe():
    config = config_of(**{"probe.name": "folder", "probe.dir": "/nowhere"})
    with pytest.raises(UserError, match=r"probe\.train_split.*there is no folder /nowhere"):
        make_probe(config, SmallTask(make_mesh()), Writer())


def test_pictures_that_cannot_be_decoded_stop_the_probe_or_are_left_out(sources):
    sources["train"].broken = (3, 30)
    task, writer = SmallTask(make_mesh()), Writer()
    state = task.state()
    with pytest.raises(DecodeError, match="pictures/train#3"):
        make_probe(config_of(), task, writer)(1, state)
    make_probe(config_of(**{"data.bad_records": "skip"}), task, writer)(1, state)
    assert writer.lines[0]["probe/train_examples"] == 58
    assert writer.lines[0]["probe/top1"] == probe_by_hand(initial_state(seed=5).params, sources)


def run_as_one_of_several(workdir):
    """What a process does in the test below."""
    from mae_jax.distributed import startup

    startup.initialize()
    splits = {"train": Pictures(count=60), "validation": Pictures(split="validation", count=40)}
    probe_module.open_source = lambda name, directory, split: splits[split]
    task = SmallTask(make_mesh(-1, 2))
    writer = MetricsWriter(workdir, 0)
    make_probe(config_of(), task, writer)(1, task.state())
    writer.close()
    # Each process has looked at its own rows alone (and at the labels, before the run).
    decoded = len(splits["train"].reads) - len(range(0, 60))
    (pathlib.Path(workdir) / f"decoded_{jax.process_index()}").write_text(str(decoded))


def test_two_processes_find_what_one_finds(sources, tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=4"]
    done = subprocess.run(
        [*command, "--", sys.executable, __file__, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["probe/top1"] == probe_by_hand(initial_state(seed=5).params, sources)
    assert line["probe/top1_untrained"] == probe_by_hand(initial_state().params, sources)
    decoded = [int((tmp_path / f"decoded_{i}").read_text()) for i in (0, 1)]
    assert sorted(decoded) == [28, 32]  # of 60 in batches of 16, 8 rows each


if __name__ == "__main__":
    run_as_one_of_several(sys.argv[1])
