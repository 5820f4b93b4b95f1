"""`bitcpm doctor`: what is installed here, what works, and a fix for what does not.

    diagnose()      -> probe name -> `Finding`
    render_table(), render_json(), exit_code()

Imports neither torch nor Megatron, and survives both being broken: torch is asked in a process of
its own (`torch_facts`), and a probe that fails becomes a finding itself. The probes are small
functions of what they look at, so that other machines can be imitated: `machine`, `ascend`,
`software`; `diagnose` has the table of them.
"""

from megatron_bitcpm.doctor.diagnose import diagnose
from megatron_bitcpm.doctor.finding import Finding, exit_code, render_json, render_table

__all__ = ["Finding", "diagnose", "exit_code", "render_json", "render_table"]
