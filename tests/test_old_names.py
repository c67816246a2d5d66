"""Modules and public names of lit_rlft in 0.1.0, which work for one more release."""

import importlib
import sys
import warnings

import pytest

# What 0.1.0 had, and modules of 0.2.0; names that only its own modules used are left out.
NAMES = """
adapters: LoRA Reference attach_lora
algorithms.base: Draw Experience RewardFineTuner
algorithms.drtune: GradientWalk RewardGradient
algorithms.inverse_noise_correction: InverseNoiseCorrection
array_cache: cached_folder open_arrays save_arrays user_cache
best_of: best_of
bootstrap: Features Moments compared
evaluation.bootstrap: Features Moments compared
checkpoint: check_file fingerprint reduce
core.judge: Judge Output
core.mmd: Kernel gaussian median_distance mmd polynomial similarity
cost: Cost count_calls count_flops flop_counter flops_per_call now peak_memory_bytes
data: Record Rows Split SplitData collate hold_out
entries: BadEntry Report
evaluation: Arm Measured moments
layers: NUM_FREQUENCIES frequencies normed zero
muon: MuonAdamW
noise_generator: NoiseGenerator
observer: Observer
pictures: check_pictures save_pictures to_image
processes: gather together
report: before_after comparison write_png
runs: make_folder run_folder summary_writer trainer_settings
weights: CONFIG WEIGHTS load_weights read_settings save_network
"""
OLD = {
    f"lit_rlft.{module}": names.split()
    for module, _, names in (line.partition(": ") for line in NAMES.strip().splitlines())
}
SAME = {"lit_rlft.algorithms.base", "lit_rlft.algorithms.inverse_noise_correction"}


@pytest.mark.parametrize("module", OLD)
def test_old_modules_have_their_names_and_say_the_new_ones(module: str) -> None:
    if getattr(sys.modules.get(module), "__file__", None) is None:
        sys.modules.pop(module, None)  # warned already
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = importlib.import_module(module)
        missing = [name for name in OLD[module] if not hasattr(loaded, name)]
    assert not missing
    warned = [w for w in said if issubclass(w.category, FutureWarning) and module in str(w.message)]
    assert bool(warned) == (module not in SAME)
