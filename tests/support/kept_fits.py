"""The contract of influence, with a fit made once for all claims that ask for the same one."""

from functools import cache

from headwater.testing import InfluenceContract


class KeptFits(InfluenceContract):
    """No claim changes what was fitted. A subclass's hooks say the same at every call."""

    def fitted(self, damping=None, batch_size=3):
        return _fitted(type(self), damping, batch_size)


@cache
def _fitted(kind, damping, batch_size):
    return super(KeptFits, kind()).fitted(damping, batch_size)
