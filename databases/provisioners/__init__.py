"""The engines that really make databases. Nothing outside this package touches a server or a file of a database."""

from django.conf import settings
from django.utils.module_loading import import_string

from databases.provisioners.base import NAME_PATTERN, Provisioned, Provisioner, ProvisioningError

__all__ = ["NAME_PATTERN", "Provisioned", "Provisioner", "ProvisioningError", "get_provisioner"]


def get_provisioner() -> Provisioner:
    """Return the engine that the setting `DATABASES_PROVISIONER` names, as a dotted path."""
    provisioner: Provisioner = import_string(settings.DATABASES_PROVISIONER)()
    return provisioner
