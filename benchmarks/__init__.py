"""Benchmarks of the operators and networks: `sr-kernels bench`.

Every number is made in this order: a provider's result is held against the definition in float64
(:mod:`.verify`), then it is timed in turn with all others (:mod:`.measure`), next to ceilings of
the machine taken in the same run (:mod:`.ceilings`), and written as one row (:mod:`.table`).
``cases.yaml`` lists what is measured, :mod:`.operators` and :mod:`.networks` say what each case
computes and costs, :mod:`.providers` who computes it. Installed as ``sr_kernels.benchmarks``.
"""
