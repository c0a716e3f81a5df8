"""`expert_ffn` equals the reference, values and gradients, for any routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2_jax.ops.expert_ffn.api import expert_ffn


def problem(seed, tokens, experts, k, width=12, hidden=8):
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(tokens, width), (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    x, gate, up, down = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    scores = jax.random.normal(keys[4], (tokens, experts)) * 3 + jax.random.normal(keys[5], (experts,)) * 3
    weights, ids = jax.lax.top_k(jax.nn.softmax(scores), k)
    return (x, gate, up, down, ids, weights)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 7, 33, 70]), st.sampled_from([1, 4, 9]), st.data())
def test_any_routing_equals_the_reference(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    arguments = problem(seed, tokens, experts, k)
    ours = expert_ffn(*arguments)
    np.testing.assert_allclose(ours, expert_ffn(*arguments, implementation="reference"), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ids", [[[0]] * 33, [[3]] * 5, [[0, 1], [1, 0], [2, 3]]])
def test_one_expert_may_take_everything(ids):
    x, gate, up, down, _, _ = problem(0, len(ids), 4, 1)
    ids = jnp.asarray(ids)
    weights = jnp.ones(ids.shape)
    ours = expert_ffn(x, gate, up, down, ids, weights)
    reference = expert_ffn(x, gate, up, down, ids, weights, implementation="reference")
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (37, 6, 3), (64, 3, 1)])
def test_gradients_equal_those_of_the_reference(tokens, experts, k):
    x, gate, up, down, ids, weights = problem(1, tokens, experts, k)

    def loss(implementation, x, gate, up, down, weights):
        return jnp.sum(jnp.sin(expert_ffn(x, gate, up, down, ids, weights, implementation=implementation)))

    arguments = (x, gate, up, down, weights)
    ours = jax.grad(loss, argnums=(1, 2, 3, 4, 5))(None, *arguments)
    reference = jax.grad(loss, argnums=(1, 2, 3, 4, 5))("reference", *arguments)
    for a, b in zip(ours, reference):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
