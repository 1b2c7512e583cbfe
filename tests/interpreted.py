"""TPU kernels in Pallas's interpreter, where a race between DMAs and accesses fails the test on every supported jax."""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


@contextlib.contextmanager
def interpreted():
    """Inside, TPU kernels are interpreted; results must be ready at its end. jax 0.11 only notes races, 0.12 raises."""
    states, make = [], interpret_pallas_call.RaceDetectionState

    def noted(*args, **kwargs):
        states.append(make(*args, **kwargs))
        return states[-1]

    interpret_pallas_call.RaceDetectionState = noted
    try:
        with dispatch.interpreted(pltpu.InterpretParams(detect_races=True)):
            yield
        assert not any(state.races_found for state in states), "RACE DETECTED"
    finally:
        interpret_pallas_call.RaceDetectionState = make
