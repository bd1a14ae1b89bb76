import statistics

import numpy as np
import pytest

from resflax.run import progress


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (2.3, 1e-6), (1e4, 0.0)])
def test_the_window_has_the_statistics_of_its_numbers(mean, spread):
    numbers = (mean + spread * np.random.default_rng(0).standard_normal(1000)).tolist()
    window = progress._Window()
    for count, number in enumerate(numbers, start=1):
        window.append(number)
        last = numbers[max(0, count - 100) : count]
        assert window.is_full == (len(last) == 100)
        assert window.mean == pytest.approx(statistics.fmean(last), rel=1e-12, abs=1e-12)
        assert window.deviation == pytest.approx(statistics.pstdev(last), rel=1e-5, abs=1e-9)
