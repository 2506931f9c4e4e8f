"""Generators of noise, against the numbers of those whose noise it is. (PyTorch's: test_sd.py)"""

import numpy as np
import pytest

import sd
from sd_more.noise import GENERATORS, philox
from tests.reference import assert_close


def test_the_first_of_the_generators_is_the_usual_one():
    assert next(iter(GENERATORS.items())) == ("torch", sd.torch_normal)


def test_noise_is_numpys():
    truth, draw = np.random.RandomState(5), GENERATORS["numpy"](5)
    for shape in ((1, 4, 8, 8), (3,)):
        assert np.array_equal(draw(shape), truth.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_published_with_random123(counter, key, answer):
    words = philox(np.array(counter, np.uint32)[:, None], key)[:, 0]
    assert " ".join(f"{word:08x}" for word in words) == answer


def test_philox_noise_is_that_of_torch_on_a_gpu():
    draw = GENERATORS["philox"](0)
    assert_close(draw((5,)), [-0.92466259, -0.42534415, -2.64384580, 0.14518388, -0.12086647], 1e-6)
    assert abs(draw((5,))[0] + 0.92466259) > 1e-3  # the second call is another


@pytest.mark.parametrize("name", GENERATORS)
def test_noise_is_normal_and_another_for_each_seed_and_call(name):
    draw = GENERATORS[name](1)
    a, b, c = draw((1, 4, 64, 64)), draw((1, 4, 64, 64)), GENERATORS[name](2)((1, 4, 64, 64))
    for x in (a, b, c):
        assert x.dtype == np.float32 and abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03
    for x, y in ((a, b), (a, c)):
        assert abs((x * y).mean()) < 0.03
    assert np.array_equal(a, GENERATORS[name](1)((1, 4, 64, 64)))
    for seed in (-1, 2**70):
        assert GENERATORS[name](seed)((4, 4)).shape == (4, 4)
