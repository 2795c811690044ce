"""The engines that really make databases. Nothing outside this package touches a server or a file of a database."""

from django.conf import settings
from django.utils.module_loading import import_string

from databases.provisioners.base import (
    NAME_PATTERN,
    Contents,
    InUse,
    Provisioned,
    Provisioner,
    ProvisioningError,
    Refused,
)

__all__ = [
    "NAME_PATTERN",
    "Contents",
    "InUse",
    "Provisioned",
    "Provisioner",
    "ProvisioningError",
    "Refused",
    "get_provisioner",
]


def get_provisioner(engine: str) -> Provisioner:
    """Return what the setting `DATABASES_PROVISIONERS` names for an engine, as a dotted path."""
    provisioner: Provisioner = import_string(settings.DATABASES_PROVISIONERS[engine])()
    return provisioner
