"""The peak of real tensors, from the allocator's own events."""

from torch.profiler import profile

__all__ = ["peak_of"]


def peak_of(profiler: profile) -> int:
    """Return the most bytes that lived at once of those allocated while a profiler ran."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    sizes = sorted(found, key=lambda event: event[0])  # those of one moment in their order
    live = peak = 0
    for _, size in sizes:
        live += size
        peak = max(peak, live)
    return peak
