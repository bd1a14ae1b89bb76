"""What a run is put together from."""

import pytest
from small import config as small_config

from resflax import build


@pytest.mark.parametrize(
    ("steps", "count"),
    [(1, 1), (11, 11), (32, 32), (33, 32), (390, 30), (467, 31), (468, 26)],
)
def test_a_call_has_so_many_steps_that_calls_are_few(steps, count):
    assert build.fewest_dispatches(steps) == count


def test_a_processor_takes_step_by_step_unless_told():
    config = small_config()
    count = {"steps_per_epoch": 12, "total_steps": 100, "on_devices": True}
    assert build.steps_per_call(config, **count) == 1
    config.train.steps_per_call = 12
    assert build.steps_per_call(config, **count) == 12
    config.train.steps_per_call = 13
    with pytest.raises(ValueError, match="13 is more than the 12 steps until"):
        build.steps_per_call(config, **count)
