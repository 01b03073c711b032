"""Names that Google Cloud knows. Source: its Compute Engine v1 and TPU v2 API reference, 2026.

Node configs are instances.insert and nodes.create requests; only the parts that are often written
by hand are listed, so an unlisted key proves nothing and a nearly listed one much.
"""

from __future__ import annotations

import re

_REGIONS = """
africa-south1 asia-east1 asia-east2 asia-northeast1 asia-northeast2 asia-northeast3 asia-south1
asia-south2 asia-southeast1 asia-southeast2 asia-southeast3 australia-southeast1
australia-southeast2 europe-central2 europe-north1 europe-north2 europe-southwest1 europe-west1
europe-west2 europe-west3 europe-west4 europe-west6 europe-west8 europe-west9 europe-west10
europe-west12 me-central1 me-central2 me-west1 northamerica-northeast1 northamerica-northeast2
northamerica-south1 southamerica-east1 southamerica-west1 us-central1 us-central2 us-east1
us-east4 us-east5 us-east7 us-south1 us-west1 us-west2 us-west3 us-west4 us-west8
"""
REGIONS = frozenset(_REGIONS.split())

_FAMILIES = (
    "a2 a3 a4 a4x c2 c2d c3 c3d c4 c4a c4d e2 f1 g1 g2 g4 h3 h4d m1 m2 m3 m4 n1 n2 n2d n4 n4a n4d "
    "t2a t2d x4 z3"
)
FAMILIES = frozenset(_FAMILIES.split())
_CLASSES = (
    "standard highmem highcpu ultramem megamem hypermem highgpu megagpu ultragpu edgegpu maxgpu "
    "highlssd standardlssd lowmem medium micro small"
)

_SHARED_CORE = re.compile(r"(e2-(micro|small|medium)|f1-micro|g1-small)")
_CUSTOM = re.compile(r"((e2|n1|n2|n2d|n4|g2)-)?custom-(?P<cpus>\d+)-\d+(-ext)?")
_SIZED = re.compile(
    rf"(?P<family>{_FAMILIES.replace(' ', '|')})-({_CLASSES.replace(' ', '|')})-"
    r"(?P<size>\d+)(?P<gpu>g)?(-(nolssd|lssd|metal|standardlssd|highlssd))?"
)


def is_machine_type(name: str) -> bool:
    """Whether `name` is spelt like a machine type of a family that exists."""
    return any(form.fullmatch(name) for form in (_SIZED, _CUSTOM, _SHARED_CORE))


def num_cpus(name: str) -> int | None:
    """vCPUs, where the name tells: `n2-standard-8` has 8; `a2-highgpu-1g` hides it."""
    match = _SIZED.fullmatch(name) or _CUSTOM.fullmatch(name)
    if match is None or match.groupdict().get("gpu"):
        return None
    return int(match.groupdict().get("size") or match.groupdict()["cpus"])


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


INSTANCE_KEYS = {
    "": _names(
        """
        machineType disks networkInterfaces labels tags metadata scheduling serviceAccounts
        guestAccelerators resourcePolicies minCpuPlatform canIpForward deletionProtection
        shieldedInstanceConfig confidentialInstanceConfig reservationAffinity
        advancedMachineFeatures networkPerformanceConfig displayDevice hostname description
        params privateIpv6GoogleAccess sourceMachineImage sourceInstanceTemplate
        instanceEncryptionKey keyRevocationActionType name workloadIdentityConfig
        acceleratorType acceleratorConfig runtimeVersion networkConfig networkConfigs
        schedulingConfig serviceAccount dataDisks health cidrBlock queuedResource
        bootDiskConfig autocheckpointEnabled multisliceNode shieldedInstanceConfig
        """
    ),
    "disks": _names(
        """
        boot autoDelete type mode interface source deviceName index initializeParams
        diskSizeGb diskEncryptionKey guestOsFeatures licenses architecture forceAttach
        savedState kind
        """
    ),
    "disks.initializeParams": _names(
        """
        diskSizeGb diskType sourceImage sourceImageEncryptionKey sourceSnapshot diskName
        description labels resourcePolicies provisionedIops provisionedThroughput
        onUpdateAction licenses architecture storagePool replicaZones
        enableConfidentialCompute resourceManagerTags sourceSnapshotEncryptionKey
        """
    ),
    "networkInterfaces": _names(
        """
        network subnetwork networkIP accessConfigs aliasIpRanges nicType stackType
        queueCount kind ipv6AccessConfigs ipv6Address networkAttachment
        internalIpv6PrefixLength name fingerprint igmpQuery vlan parentNicName
        """
    ),
    "networkInterfaces.accessConfigs": _names(
        """
        name type natIP networkTier setPublicPtr publicPtrDomainName kind externalIpv6
        externalIpv6PrefixLength securityPolicy
        """
    ),
    "scheduling": _names(
        """
        preemptible provisioningModel instanceTerminationAction onHostMaintenance
        automaticRestart maxRunDuration terminationTime onInstanceStopAction
        hostErrorTimeoutSeconds locationHint nodeAffinities minNodeCpus
        localSsdRecoveryTimeout availabilityDomain maintenanceInterval
        """
    ),
    "guestAccelerators": _names("acceleratorType acceleratorCount"),
    "serviceAccounts": _names("email scopes"),
    "networkConfig": _names("network subnetwork enableExternalIps canIpForward queueCount"),
    "schedulingConfig": _names("preemptible reserved spot terminationTimestamp"),
    "acceleratorConfig": _names("type topology"),
}
