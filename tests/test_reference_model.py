"""Properties of the reference model, on tiny checkpoints.

Each fails if the reference forgets the mechanism it is about. tests/parity compares with transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from . import reference_model as reference
from . import tiny

WINDOW = 8  # of the tiny checkpoints
GEMMA4_TEXT = "model.language_model"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("gemma3")
    tiny.write_gemma3(folder)
    return reference.load_checkpoint(folder)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("gemma4")
    tiny.write_gemma4(folder)
    return reference.load_checkpoint(folder)


@pytest.fixture
def load(tmp_path: Path):
    """Write a checkpoint with options of its own and load it."""

    def written(write, **options):
        write(tmp_path / "checkpoint", **options)
        return reference.load_checkpoint(tmp_path / "checkpoint")

    return written


def token_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 500, length)


def grid(rows: int, columns: int) -> np.ndarray:
    """Positions (x, y) of a raster of patches."""
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def image(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random patches in [0, 1] and their positions."""
    return np.random.default_rng(seed).random((rows * columns, 768)), grid(rows, columns)


def rows_changed_by_first_token(logits_of, length: int) -> np.ndarray:
    """Positions whose logits change when token 0 changes."""
    ids = token_ids(length)
    other = ids.copy()
    other[0] = 39
    return np.flatnonzero((logits_of(ids) != logits_of(other)).any(axis=1))


# Who sees whom


@pytest.mark.parametrize(("layers", "reach"), [(1, WINDOW - 1), (2, 2 * (WINDOW - 1))])
def test_gemma3_window_ends_after_exactly_window_keys(load, layers: int, reach: int) -> None:
    """A sliding layer reads `window` keys, its own among them: token 0 reaches W - 1 and not W; two layers add up.

    The test for windows that are dropped, off by one, or applied to all layers.
    """
    weights, config = load(tiny.write_gemma3, num_hidden_layers=layers, sliding_window_pattern=9)
    changed = rows_changed_by_first_token(lambda ids: reference.gemma3_text_logits(weights, config, ids), 30)
    assert changed.tolist() == list(range(reach + 1))


def test_gemma3_global_layer_sees_everything(load) -> None:
    checkpoint = load(tiny.write_gemma3, num_hidden_layers=1, sliding_window_pattern=1)
    changed = rows_changed_by_first_token(lambda ids: reference.gemma3_text_logits(*checkpoint, ids), 30)
    assert changed.tolist() == list(range(30))


@pytest.mark.parametrize(
    ("layers", "shared", "reach"), [(1, 0, WINDOW - 1), (3, 0, 3 * (WINDOW - 1)), (3, 2, WINDOW - 1)]
)
def test_gemma4_sharing_layers_keep_the_window_and_add_no_reach(load, layers: int, shared: int, reach: int) -> None:
    """Layers that read the keys and values of layer 0 see its inputs, which are embeddings, through the same window:
    stacking them carries token 0 no further."""
    kinds = ["sliding_attention"] * layers
    weights, config = load(
        tiny.write_gemma4, num_hidden_layers=layers, layer_types=kinds, num_kv_shared_layers=shared, vision=False
    )
    changed = rows_changed_by_first_token(lambda ids: reference.gemma4_text_logits(weights, config, ids), 30)
    assert changed.tolist() == list(range(reach + 1))


@pytest.mark.parametrize(
    ("source", "sharers"), [(1, (3, 5)), (2, (4, 6))], ids=["sliding layers read layer 1", "global layers read layer 2"]
)
def test_sharing_layers_read_the_last_layer_of_their_kind(gemma4, source: int, sharers: tuple[int, int]) -> None:
    """With its own attention output cut off, a layer's keys matter if and only if a layer that shares them listens."""
    weights, config = gemma4

    def output(layer: int) -> str:
        return f"{GEMMA4_TEXT}.layers.{layer}.self_attn.o_proj.weight"

    def keys_matter(listening: tuple[int, ...]) -> bool:
        cut = {output(layer): 0 * weights[output(layer)] for layer in (source, *sharers) if layer not in listening}
        keys = f"{GEMMA4_TEXT}.layers.{source}.self_attn.k_proj.weight"
        before = reference.gemma4_text_logits(weights | cut, config, token_ids(12))
        after = reference.gemma4_text_logits(weights | cut | {keys: -weights[keys]}, config, token_ids(12))
        return not np.array_equal(before, after)

    assert not keys_matter(())
    assert all(keys_matter((layer,)) for layer in sharers)


def image_prompt(config, soft_tokens: int) -> tuple[np.ndarray, slice]:
    """Ids with one image after five tokens, and the rows of its soft tokens."""
    soft = [config["image_token_id"]] * soft_tokens
    ids = [*token_ids(4), config["boi_token_id"], *soft, config["eoi_token_id"], *token_ids(10, seed=1)]
    return np.array(ids), slice(5, 5 + soft_tokens)


def test_soft_tokens_enter_causally(gemma4) -> None:
    """E2B and E4B: no row sees a soft token behind it, not even a row of the same image."""
    weights, config = gemma4
    ids, rows = image_prompt(config, 6)
    soft = reference.gemma4_soft_tokens(weights, config, *image(6, 9))
    before = reference.gemma4_text_logits(weights, config, ids, [soft])
    soft[3] += 0.1
    after = reference.gemma4_text_logits(weights, config, ids, [soft])
    changed = (before != after).any(axis=1)
    assert changed.tolist() == [row >= rows.start + 3 for row in range(len(ids))]


def test_images_fill_their_places_in_order(gemma4) -> None:
    weights, config = gemma4
    ids, _ = image_prompt(config, 6)
    soft = reference.gemma4_soft_tokens(weights, config, *image(6, 9))
    whole = reference.gemma4_text_logits(weights, config, ids, [soft])
    np.testing.assert_array_equal(reference.gemma4_text_logits(weights, config, ids, [soft[:2], soft[2:]]), whole)
    assert not np.allclose(reference.gemma4_text_logits(weights, config, ids, [soft[2:], soft[:2]]), whole)


def per_layer_inputs(weights, config, ids: np.ndarray) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(len(ids), config["text_config"]["hidden_size"]))
    return reference.gemma4_per_layer_inputs(weights, config, ids, x)


def test_per_layer_inputs_use_the_pad_id_at_soft_tokens(gemma4) -> None:
    weights, config = gemma4
    ids, rows = image_prompt(config, 6)
    name = f"{GEMMA4_TEXT}.embed_tokens_per_layer.weight"

    def rows_changed(table_row: int) -> list[int]:
        table = weights[name].copy()
        table[table_row] += 1
        before, after = (per_layer_inputs(w, config, ids) for w in (weights, weights | {name: table}))
        return np.flatnonzero((before != after).any(axis=(1, 2))).tolist()

    assert rows_changed(config["text_config"]["pad_token_id"]) == list(range(rows.start, rows.stop))
    assert rows_changed(config["image_token_id"]) == []
    assert rows_changed(config["boi_token_id"]) == [rows.start - 1]


def test_per_layer_inputs_see_the_soft_tokens_themselves(gemma4) -> None:
    """The context part projects the embedding after the image has been put in, so equal ids give unequal rows."""
    ids, rows = image_prompt(gemma4[1], 6)
    inputs = per_layer_inputs(*gemma4, ids)[rows]
    assert not np.allclose(inputs[0], inputs[1])


# Formulas


def test_norm_is_one_plus_weight_in_gemma3_and_weight_in_gemma4(gemma3, gemma4) -> None:
    """A final norm of stored weight -1 (Gemma 3) or 0 (Gemma 4) silences the model; the other way round it does not."""
    for (weights, config), logits_of, name, silent in (
        (gemma3, reference.gemma3_text_logits, "model.norm.weight", -1.0),
        (gemma4, reference.gemma4_text_logits, f"{GEMMA4_TEXT}.norm.weight", 0.0),
    ):
        for value in (-1.0, 0.0):
            changed = weights | {name: np.full_like(weights[name], value)}
            assert (logits_of(changed, config, token_ids(5)) == 0).all() == (value == silent)


def test_values_are_normed_in_gemma4_and_not_in_gemma3(load, tmp_path: Path) -> None:
    """A norm per head without weight removes the size of a head's rows in v_proj. (Louder rows in all heads would tell
    nothing: the norm behind the output projection removes a common factor.)"""
    weights, config = load(tiny.write_gemma4, num_key_value_heads=2)
    unclipped = with_value(config, "vision_config.use_clipped_linears", False)
    for output_of in (
        lambda w: reference.gemma4_text_logits(w, config, token_ids(12)),
        lambda w: reference.gemma4_soft_tokens(w, unclipped, *image(3, 6)),
    ):
        np.testing.assert_allclose(output_of(with_one_loud_value_head(weights)), output_of(weights), atol=1e-4)

    tiny.write_gemma3(tmp_path, num_key_value_heads=2)
    weights, config = reference.load_checkpoint(tmp_path)
    quiet = reference.gemma3_text_logits(weights, config, token_ids(12))
    loud = reference.gemma3_text_logits(with_one_loud_value_head(weights), config, token_ids(12))
    assert np.abs(loud - quiet).max() > 0.1


def with_one_loud_value_head(weights):
    """The rows of head 0 in every v_proj times 3; heads are 16 wide, 32 in the global layers of Gemma 4."""
    louder = dict(weights)
    for name, value in weights.items():
        if name.endswith(("v_proj.weight", "v_proj.linear.weight")):
            head_width = 16 if len(value) < 64 else 32
            louder[name] = np.concatenate([3 * value[:head_width], value[head_width:]])
    return louder


def test_neighbouring_query_heads_share_a_key_value_head() -> None:
    """Four query heads over two key/value heads: the first two look with the first key, at the first value."""
    keys = np.array([[[9.0], [-9.0]], [[-9.0], [9.0]]])  # key head 0 points at position 0, key head 1 at position 1
    values = np.array([[[1.0], [2.0]], [[3.0], [4.0]]])  # [position, head, 1]
    answer = reference.attend(np.ones((2, 4, 1)), keys, values, np.ones((2, 2), bool), scale=9.0)
    np.testing.assert_allclose(answer, [[1, 1, 4, 4]] * 2)


def test_layer_scalar_multiplies_the_residual_stream_too(load) -> None:
    """In a model of one layer the final norm removes a factor of the whole stream, but not a factor of one branch."""
    weights, config = load(
        tiny.write_gemma4, num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0, vision=False
    )
    before = reference.gemma4_text_logits(weights, config, token_ids(10))
    weights[f"{GEMMA4_TEXT}.layers.0.layer_scalar"] *= 3
    np.testing.assert_allclose(reference.gemma4_text_logits(weights, config, token_ids(10)), before, atol=1e-5)


def test_soft_cap_bounds_the_logits(gemma4) -> None:
    weights, config = gemma4
    name = f"{GEMMA4_TEXT}.norm.weight"
    logits = reference.gemma4_text_logits(weights | {name: 20 * weights[name]}, config, token_ids(10))
    assert 29.9 < np.abs(logits).max() <= 30


def test_rope_frequencies_of_the_published_models() -> None:
    """Constants of E2B: global heads of 512 of which a quarter rotates, vision heads of 64 on two axes."""
    frequencies = reference.proportional_inverse_frequencies(1e6, 512, 0.25)
    np.testing.assert_allclose(frequencies[[0, 1, 2, 63]], [1, 0.9474635, 0.8976871, 0.0333762], atol=5e-8)
    assert not frequencies[64:].any()
    assert len(frequencies) == 256
    vision = reference.default_inverse_frequencies(100.0, 32)
    np.testing.assert_allclose(vision[:3], [1, 0.7498942, 0.5623413], atol=5e-8)
    assert len(vision) == 16
    np.testing.assert_allclose(
        reference.default_inverse_frequencies(1e6, 64, factor=8) * 8, 1e6 ** (-np.arange(32) / 32)
    )


def test_rotation_pairs_dimensions_half_a_head_apart() -> None:
    """A unit vector in dimension 1 turns into dimension 1 + d/2; positions count only as differences."""
    frequencies = reference.default_inverse_frequencies(1e4, 8)
    unit = np.zeros((1, 1, 8))
    unit[..., 1] = 1
    turned = reference.rotate(unit, np.array([3]), frequencies)[0, 0]
    angle = 3 * frequencies[1]
    np.testing.assert_allclose(turned, [0, np.cos(angle), 0, 0, 0, np.sin(angle), 0, 0], atol=1e-15)

    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 8))
    products = [
        np.sum(
            reference.rotate(query, np.array([at]), frequencies)
            * reference.rotate(key, np.array([at - 5]), frequencies)
        )
        for at in (5, 50, 500)
    ]
    np.testing.assert_allclose(products, products[0])


def test_vision_rotation_turns_the_first_half_by_column_and_the_second_by_row() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 16))
    by_column = reference.rotate_2d(x, np.array([[7, 0]]), 100.0)
    by_row = reference.rotate_2d(x, np.array([[0, 7]]), 100.0)
    np.testing.assert_array_equal(by_column[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(by_row[..., :8], x[..., :8])
    assert not np.isclose(by_column[..., :8], x[..., :8]).any()


def test_pooling_averages_blocks_in_raster_order() -> None:
    """Six columns, three rows, values 0 to 17: blocks of mean 7 and 10 (14 and 20 after the factor sqrt(4))."""
    values = np.repeat(np.arange(18.0)[:, None], 4, axis=1)
    pooled = reference.pool(values, grid(3, 6), 3) * np.sqrt(4)
    np.testing.assert_allclose(pooled, [[14] * 4, [20] * 4])


def test_soft_tokens_do_not_depend_on_the_order_of_patches(gemma4) -> None:
    """Positions travel with the patches, so an engine may hand them over block by block."""
    weights, config = gemma4
    patches, positions = image(6, 9)
    shuffled = np.random.default_rng(1).permutation(len(patches))
    np.testing.assert_allclose(
        reference.gemma4_soft_tokens(weights, config, patches[shuffled], positions[shuffled]),
        reference.gemma4_soft_tokens(weights, config, patches, positions),
        atol=1e-12,
    )


# Everything in a checkpoint matters


def test_every_gemma3_tensor_matters(gemma3) -> None:
    weights, config = gemma3
    ids = token_ids(12)
    assert unread_tensors(weights, "", lambda changed: reference.gemma3_text_logits(changed, config, ids)) == []


def test_every_gemma4_text_tensor_matters(gemma4) -> None:
    weights, config = gemma4
    ids = token_ids(12)
    unread = unread_tensors(weights, GEMMA4_TEXT, lambda changed: reference.gemma4_text_logits(changed, config, ids))
    assert unread == [f"{GEMMA4_TEXT}.layers.6.layer_scalar"]  # the final norm removes the last one


def test_every_gemma4_vision_tensor_matters(gemma4) -> None:
    """Clip bounds included: each of them cuts something off."""
    weights, config = gemma4

    def soft_tokens(changed):
        return reference.gemma4_soft_tokens(changed, config, *image(3, 6))

    assert unread_tensors(weights, "model.vision_tower", soft_tokens) == []
    assert unread_tensors(weights, "model.embed_vision", soft_tokens) == []


def unread_tensors(weights, prefix: str, output_of) -> list[str]:
    """Names under `prefix` whose tensor can be changed without changing the output.

    Halving alone would not do: a norm behind a matrix removes its size. So the last axis is rotated as well.
    """
    before = output_of(weights)

    def changed(value: np.ndarray) -> np.ndarray:
        return np.roll(value, 1, axis=-1) / 2 if value.ndim else value / 2

    names = [name for name in weights if name.startswith(prefix)]
    return [name for name in names if np.abs(output_of(weights | {name: changed(weights[name])}) - before).max() < 1e-3]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("query_pre_attn_scalar", 16),
        ("sliding_window", 9),
        ("rope_parameters.full_attention.rope_theta", 1e4),
        ("rope_parameters.full_attention.factor", 8.0),
        ("rope_parameters.sliding_attention.rope_theta", 1e6),
        ("layer_types", ["full_attention"] * 4),
    ],
)
def test_gemma3_configuration_matters(gemma3, path: str, value: object) -> None:
    weights, config = gemma3
    before = reference.gemma3_text_logits(weights, config, token_ids(20))
    after = reference.gemma3_text_logits(weights, with_value(config, path, value), token_ids(20))
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.sliding_window", 9),
        ("text_config.final_logit_softcapping", None),
        ("text_config.rope_parameters.full_attention.rope_theta", 1e4),
        ("text_config.rope_parameters.full_attention.partial_rotary_factor", 1.0),
        ("text_config.rope_parameters.sliding_attention.rope_theta", 1e6),
        ("vision_config.use_clipped_linears", False),
        ("vision_config.rope_parameters.rope_theta", 1e4),
    ],
)
def test_gemma4_configuration_matters(gemma4, path: str, value: object) -> None:
    weights, config = gemma4
    ids, _ = image_prompt(config, 6)

    def logits_of(changed):
        soft = reference.gemma4_soft_tokens(weights, changed, *image(6, 9))
        return reference.gemma4_text_logits(weights, changed, ids, [soft])

    assert np.abs(logits_of(with_value(config, path, value)) - logits_of(config)).max() > 1e-3


def with_value(config: dict, path: str, value: object) -> dict:
    """A copy of `config` with the value at a dotted path replaced."""
    changed = copy.deepcopy(config)
    *parents, leaf = path.split(".")
    target = changed
    for name in parents:
        target = target[name]
    target[leaf] = value
    return changed
