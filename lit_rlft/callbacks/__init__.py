"""Lightning callbacks: sample panels, reports, cost, EMA."""
