"""The plug-in's attention over pages in vLLM's layouts equals dense attention to each whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2_jax.serving.vllm import reference

PAGE, PER_SEQUENCE, ROWS, SEQUENCES = 32, 3, 24, 4
HEADS, RANK, ROTATED, WIDTH, SCALE = 3, 20, 6, 16, 0.3
# What of each sequence is computed in each step: chunks of prompts, single tokens, and nobody in the last place.
STEPS = ([9, 1, 13], [1, 17, 1], [1, 1, 20], [20, 1, 1], [1, 1, 1])


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def dense(queries, keys, values):
    """Causal attention of one sequence, `[T, H, K]` each, in float64."""
    scores = np.einsum("thk,shk->hts", queries, keys) * SCALE
    scores[:, np.triu_indices(len(queries), 1)[0], np.triu_indices(len(queries), 1)[1]] = -np.inf
    return np.einsum("hts,shv->thv", softmax(scores), values)


def steps():
    """(rows of each sequence, the arguments that say where they belong) of every step."""
    rng = np.random.default_rng(3)
    pages = rng.permutation(SEQUENCES * PER_SEQUENCE) + 1  # of sequences in no order; page 0 is nobody's
    done = np.zeros(SEQUENCES, int)
    for counts in STEPS:
        new = np.array([*counts, 0])
        parts = [slice(a, a + n) for a, n in zip(done, new)]
        done += new
        starts = np.concatenate([[0], np.cumsum(new)])
        places = (np.where(new > 0, done, 0), pages, starts, [0, 0, len(counts)])
        yield parts, [jnp.asarray(place, jnp.int32) for place in places]


def flat(each, parts):
    """Rows of all sequences one after another, filled up to `ROWS` with what must not be looked at."""
    rows = np.concatenate([rows[part] for rows, part in zip(each, parts)])
    return jnp.asarray(np.concatenate([rows, np.full((ROWS - len(rows), *rows.shape[1:]), 1e4, np.float32)]))


def run(attend, inputs, cache):
    """Results of each sequence, computed step by step."""
    attend = jax.jit(attend)
    results = [[] for _ in range(SEQUENCES)]
    for parts, places in steps():
        out, cache = attend(*(flat(each, parts) for each in inputs), cache, *places)
        assert np.isfinite(out).all()
        for result, part, start in zip(results, parts, np.asarray(places[2])):
            result.append(np.asarray(out)[start : start + part.stop - part.start])
    return [np.concatenate(result) for result in results], np.asarray(cache)


def made(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return [rng.standard_normal((PAGE * PER_SEQUENCE, *shape)).astype(np.float32) for _ in range(SEQUENCES)]


def test_attention_to_latents_in_pages_is_dense_attention():
    q_latent, q_rotated, latents, rotated = made(HEADS, RANK), made(HEADS, ROTATED), made(RANK), made(ROTATED)
    cache = jnp.full((1 + SEQUENCES * PER_SEQUENCE, PAGE // 32, 32, 256), 7e3)

    def attend(*arrays):
        return reference.attend_to_latents(*arrays, scale=SCALE)

    results, cache = run(attend, (q_latent, q_rotated, latents, rotated), cache)
    for number, result in enumerate(results[:-1]):
        own = slice(0, len(result))
        queries = np.concatenate([q_latent[number], q_rotated[number]], axis=-1)[own]
        keys = np.concatenate([latents[number], rotated[number]], axis=-1)[own, None].repeat(HEADS, axis=1)
        expected = dense(np.float64(queries), np.float64(keys), np.float64(latents[number][own, None]))
        np.testing.assert_allclose(result, expected, atol=2e-6)
    assert (cache[0] == 7e3).all()  # rows that fill up a step are written nowhere


@pytest.mark.parametrize("packing", [1, 2])  # of float32 and bfloat16
def test_attention_to_heads_in_pages_is_dense_attention(packing):
    queries, keys, values = made(HEADS, WIDTH), made(HEADS, WIDTH, seed=1), made(HEADS, WIDTH, seed=2)
    cache = jnp.full((1 + SEQUENCES * PER_SEQUENCE, PAGE, 2 * HEADS // packing, packing, 128), 7e3)

    def attend(*arrays):
        return reference.attend_to_heads(*arrays, scale=SCALE)

    results, cache = run(attend, (queries, keys, values), cache)
    for number, result in enumerate(results[:-1]):
        own = slice(0, len(result))
        expected = dense(*(np.float64(each[number][own]) for each in (queries, keys, values)))
        np.testing.assert_allclose(result, expected, atol=2e-6)
    assert (cache[0] == 7e3).all()
