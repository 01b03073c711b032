"""Names that Azure and Ray's Azure template know.

Source: Azure's list of locations and VM size naming scheme, 2026; the parameters of
ray/autoscaler/_private/_azure/azure-vm-template.json of Ray 2.60, which a unit test compares.
"""

from __future__ import annotations

import re

_LOCATIONS = """
asiaeast asiasoutheast australiacentral australiacentral2 australiaeast australiasoutheast
austriaeast belgiumcentral brazilsouth brazilsoutheast canadacentral canadaeast centralindia
centralus chilecentral chinaeast chinaeast2 chinaeast3 chinanorth chinanorth2 chinanorth3
denmarkeast eastasia eastus eastus2 eastus3 francecentral francesouth germanynorth
germanywestcentral indonesiacentral israelcentral israelnorthwest italynorth japaneast japanwest
jioindiacentral jioindiawest koreacentral koreasouth malaysiasouth malaysiawest mexicocentral
newzealandnorth northcentralus northeurope norwayeast norwaywest polandcentral qatarcentral
southafricanorth southafricawest southcentralus southcentralus2 southeastasia southeastus
southindia spaincentral swedencentral swedensouth switzerlandnorth switzerlandwest
taiwannorth taiwannorthwest uaecentral uaenorth uksouth ukwest usgovarizona usgovtexas
usgovvirginia westcentralus westeurope westindia westus westus2 westus3
"""
LOCATIONS = frozenset(_LOCATIONS.split())

_SIZE = re.compile(
    r"(Standard|Basic)_(A|B|D|DC|E|EC|F|FX|G|GS|H|HB|HC|HX|L|M|NC|NCC|ND|NG|NM|NP|NV|PB)S?"
    r"\d+(-\d+)?[A-Za-z]*(_[A-Za-z0-9]+)*"
)


def is_vm_size(name: str) -> bool:
    """Whether `name` is spelt like a VM size of a series that exists; case does not matter."""
    return re.fullmatch(_SIZE.pattern, name, re.IGNORECASE) is not None


_ARM = """
vmSize vmName adminUsername publicKey imagePublisher imageOffer imageSku imageVersion imageId
osDiskSize provisionPublicIp priority evictionPolicy billingProfile enableAcceleratedNetworking
zones vmTags vmCount msi nsg subnet availability_zone
"""
ARM_PARAMETERS = frozenset(_ARM.split())
"""What `azure_arm_parameters` may hold: Azure refuses a deployment with any other."""

NODE_CONFIG_KEYS = frozenset({"azure_arm_parameters", "tags", "azure_arm_template"})
