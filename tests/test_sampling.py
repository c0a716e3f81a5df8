"""The sampling filters equal the recorded ones, applied in turn."""

import jax.numpy as jnp
import numpy as np

from tests.conftest import GOLDENS
from vl2_jax.inference.sampling import keep_likeliest, penalise_repetition


def test_filters_equal_the_recorded_ones():
    with np.load(GOLDENS / "units" / "sampling.npz") as arrays:
        logits, vocabulary = arrays["logits"], arrays["logits"].shape[1]
        seen = np.zeros(logits.shape, bool)
        np.put_along_axis(seen, arrays["input_ids"], True, axis=1)
        penalised = penalise_repetition(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(1.1))
        np.testing.assert_allclose(penalised, arrays["after_repetition_penalty_1_1"], rtol=1e-6)
        heated = penalised / 0.4
        np.testing.assert_allclose(heated, arrays["after_temperature_0_4"], rtol=1e-6)
        kept = keep_likeliest(heated, jnp.int32(vocabulary), jnp.float32(0.9))
        np.testing.assert_allclose(kept, arrays["after_top_p_0_9"], rtol=1e-6)
