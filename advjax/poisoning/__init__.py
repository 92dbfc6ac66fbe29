"""Model poisoning: what malicious clients send in place of their updates.

Without state: `updates = poisoning.NAME(key, updates, is_byzantine, knows=None, ...)`, the rows of
the malicious clients (bool[n]) of the honest updates f32[n, d] replaced and the others as they
were. `knows` bool[n] says whose honest updates the attacker sees, by default those of the
malicious clients. `stateless` makes a `Poisoning` of such a function.

With state, or in need of the model and the data: `Poisoning(init, craft)`, such as `mpaf()`.
`choose` makes one program of several attacks. `label_flip` acts on data.
"""

from advjax.poisoning.attackers import Context, Poisoning, choose, stateless
from advjax.poisoning.distances import min_max, min_sum
from advjax.poisoning.fakes import mpaf
from advjax.poisoning.flexible import Search, control_update, f_fmpa, i_fmpa
from advjax.poisoning.labels import label_flip
from advjax.poisoning.noise import gaussian, no_attack, sign_flip
from advjax.poisoning.statistics import ipm, lie
from advjax.poisoning.tailored import fang

__all__ = [
    "Context",
    "Poisoning",
    "Search",
    "choose",
    "control_update",
    "f_fmpa",
    "fang",
    "gaussian",
    "i_fmpa",
    "ipm",
    "label_flip",
    "lie",
    "min_max",
    "min_sum",
    "mpaf",
    "no_attack",
    "sign_flip",
    "stateless",
]
