"""Everything that replaces symbols of others, and every question for a version.

* `patch`: a replacement as data, and sets of them that are applied and reverted.
* `versions`: the release of a package that runs here, and the tested ones of megatron-core.
* `cpu`, `core`: the catalogues of what a CPU and what stock megatron-core lack.
"""
