import numpy as np
import pytest

from mae_jax.evaluators.probes import PENALTIES, knn_accuracy, ridge_probe


def clusters(n, m, d=12, classes=4, spread=0.6, seed=0):
    """Gaussian clusters as (train, labels, eval, labels); features far from standardised."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))

    def draw(count):
        labels = rng.integers(0, classes, count)
        x = centres[labels] + spread * rng.normal(size=(count, d))
        return (x * np.geomspace(1e-2, 1e2, d) + 7.0).astype(np.float32), labels

    return *draw(n), *draw(m)


def fit_and_predict(x, labels, x_eval, classes, penalty):
    """Ridge regression as its definition reads, with one-hot targets that are centred."""
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    z, z_eval = (x - mean) / np.sqrt(variance + 1e-6), (x_eval - mean) / np.sqrt(variance + 1e-6)
    y = np.eye(classes)[labels]
    system = z.T @ z + penalty * len(z) * np.identity(z.shape[1])
    weights = np.linalg.inv(system) @ z.T @ (y - y.mean(0))
    return (z_eval @ weights + y.mean(0)).argmax(1)


def test_ridge_probe_is_the_closed_form_with_the_penalty_a_fifth_chooses():
    x, y, x_eval, y_eval = clusters(203, 97, spread=1.2)
    a, b = x.astype(np.float64), x_eval.astype(np.float64)
    order = np.random.default_rng(0).permutation(203)
    held_out, rest = order[:40], order[40:]
    scores = {
        penalty: (fit_and_predict(a[rest], y[rest], a[held_out], 4, penalty) == y[held_out]).mean()
        for penalty in PENALTIES
    }
    best = max(scores, key=lambda penalty: (scores[penalty], penalty))
    expected = (fit_and_predict(a, y, b, 4, best) == y_eval).mean()
    assert 0.5 < expected < 1
    assert ridge_probe(x, y, x_eval, y_eval, 4) == expected


def test_separable_classes_are_told_apart_and_noise_is_not():
    x, y, x_eval, y_eval = clusters(400, 400, spread=0.1)
    assert ridge_probe(x, y, x_eval, y_eval, 4) == 1.0
    # Accuracy on 400 unrelated labels of four classes: 0.25, standard deviation 0.022.
    unrelated = np.random.default_rng(1).permutation(y_eval)
    assert abs(ridge_probe(x, y, x_eval, unrelated, 4) - 0.25) < 5 * 0.022


def test_the_probe_does_not_depend_on_scale_or_offset_of_a_feature():
    x, y, x_eval, y_eval = clusters(300, 300, spread=1.0)
    scale, offset = np.geomspace(50, 2, 12), np.arange(12)
    moved = ridge_probe(x * scale + offset, y, x_eval * scale + offset, y_eval, 4)
    # Not bit for bit: eps 1e-6 beside the variance, float32 features.
    assert abs(moved - ridge_probe(x, y, x_eval, y_eval, 4)) <= 1 / 300


def test_constant_features_and_absent_classes_are_no_obstacle():
    x, y, x_eval, y_eval = clusters(200, 100, spread=0.1)
    x[:, 3] = x_eval[:, 3] = 5.0
    assert ridge_probe(x, y, x_eval, y_eval, 10) == 1.0


def test_more_features_than_examples_are_no_obstacle():
    x, y, x_eval, y_eval = clusters(40, 200, d=128, spread=0.3)
    assert ridge_probe(x, y, x_eval, y_eval, 4) > 0.95


def neighbours_vote(x, labels, query, classes, k, temperature):
    """One query's class, as the definition reads."""
    similarity = x @ query / (np.linalg.norm(x, axis=1) * np.linalg.norm(query))
    votes = np.zeros(classes)
    for i in np.argsort(-similarity)[:k]:
        votes[labels[i]] += np.exp(similarity[i] / temperature)
    return votes.argmax()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (40, 1.0), (1000, 0.2)])
def test_neighbours_vote_as_the_definition_reads(k, temperature):
    x, y, x_eval, y_eval = clusters(150, 60, spread=1.0)
    votes = [neighbours_vote(x.astype(np.float64), y, q, 4, k, temperature) for q in x_eval]
    found = knn_accuracy(x, y, x_eval, y_eval, 4, k=k, temperature=temperature)
    assert found == (np.asarray(votes) == y_eval).mean()


def test_the_length_of_a_feature_vector_does_not_move_its_neighbours():
    x, y, x_eval, y_eval = clusters(150, 60, spread=1.0)
    lengths = np.geomspace(1e-3, 1e3, 150, dtype=np.float32)[:, None]
    plain = knn_accuracy(x, y, x_eval, y_eval, 4, k=5)
    assert knn_accuracy(x * lengths, y, x_eval, y_eval, 4, k=5) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:-1], y), "do not go with"),
        (lambda x, y: (x, np.where(y == 1, -1, y)), "labels -1 to 3 for 4 classes"),
        (lambda x, y: (x, y + 1), "labels 1 to 4 for 4 classes"),
        (lambda x, y: (x * np.nan, y), "not finite"),
        (lambda x, y: (x[:1], y[:1]), "at least 2"),
    ],
)
def test_inputs_that_would_give_a_meaningless_number_are_refused(change, message):
    x, y, x_eval, y_eval = clusters(20, 20)
    x, y = change(x, y)
    with pytest.raises(ValueError, match=message):
        ridge_probe(x, y, x_eval, y_eval, 4)
