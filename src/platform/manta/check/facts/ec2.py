"""Names that EC2 knows. Source: EC2's API model in botocore 1.43.117.

A unit test compares these with the installed botocore, so that an upgrade shows what is new.
"""

from __future__ import annotations

_REGIONS = """
af-south-1 ap-east-1 ap-east-2 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1
ap-south-2 ap-southeast-1 ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5
ap-southeast-6 ap-southeast-7 ca-central-1 ca-west-1 cn-north-1 cn-northwest-1 eu-central-1
eu-central-2 eu-north-1 eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 il-central-1
me-central-1 me-south-1 mx-central-1 sa-east-1 us-east-1 us-east-2 us-gov-east-1 us-gov-west-1
us-west-1 us-west-2
"""
REGIONS = frozenset(_REGIONS.split())

_SIZES_OF_FAMILIES = """
a1: medium large xlarge 2xlarge 4xlarge metal
c1: medium xlarge
c3 c4 r3: large xlarge 2xlarge 4xlarge 8xlarge
c5 c5d: large xlarge 2xlarge 4xlarge 9xlarge 12xlarge 18xlarge 24xlarge metal
c5a c5ad m5a m5ad r5a r5ad: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge
c5n: large xlarge 2xlarge 4xlarge 9xlarge 18xlarge metal
c6g c6gd r6g r6gd x2gd c7g m7g r7g c7gn c7gd m7gd r7gd: medium large xlarge 2xlarge 4xlarge
 8xlarge 12xlarge 16xlarge metal
c6gn: medium large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge
c6i m6i r6i c6id m6id r6id c6in m6in m6idn r6in r6idn: large xlarge 2xlarge 4xlarge 8xlarge
 12xlarge 16xlarge 24xlarge 32xlarge metal
cc1 cg1 hi1 gr6f: 4xlarge
cc2 cr1 hs1: 8xlarge
d2 d3 i2: xlarge 2xlarge 4xlarge 8xlarge
d3en: xlarge 2xlarge 4xlarge 6xlarge 8xlarge 12xlarge
dl1 p3dn p4d p4de dl2q: 24xlarge
f1: 2xlarge 4xlarge 16xlarge
g2: 2xlarge 8xlarge
g3 hpc7g: 4xlarge 8xlarge 16xlarge
g3s: xlarge
g4ad: xlarge 2xlarge 4xlarge 8xlarge 16xlarge
g4dn: xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge metal
g5 g6 g6e: xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 48xlarge
g5g: xlarge 2xlarge 4xlarge 8xlarge 16xlarge metal
hpc6a p5e p5en p6-b200 p6-b300 trn2u: 48xlarge
h1: 2xlarge 4xlarge 8xlarge 16xlarge
i3: large xlarge 2xlarge 4xlarge 8xlarge 16xlarge metal
i3en: large xlarge 2xlarge 3xlarge 6xlarge 12xlarge 24xlarge metal
im4gn r4 i4g: large xlarge 2xlarge 4xlarge 8xlarge 16xlarge
inf1: xlarge 2xlarge 6xlarge 24xlarge
is4gen: medium large xlarge 2xlarge 4xlarge 8xlarge
m1: small medium large xlarge
m2: xlarge 2xlarge 4xlarge
m3: medium large xlarge 2xlarge
m4: large xlarge 2xlarge 4xlarge 10xlarge 16xlarge
m5 m5d m5dn m5n r5 r5b r5d r5dn r5n: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge
 24xlarge metal
m5zn z1d: large xlarge 2xlarge 3xlarge 6xlarge 12xlarge metal
m6a c6a r6a: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 32xlarge 48xlarge
 metal
m6g m6gd: metal medium large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge
mac1 mac2 mac2-m2pro mac2-m2 mac2-m1ultra mac-m4 mac-m4pro mac-m4max mac-m3ultra: metal
p2: xlarge 8xlarge 16xlarge
p3: 2xlarge 8xlarge 16xlarge
t1: micro
t2 t3 t3a t4g: nano micro small medium large xlarge 2xlarge
u-6tb1: 56xlarge 112xlarge metal
u-9tb1 u-12tb1: 112xlarge metal
u-18tb1 u-24tb1: metal 112xlarge
vt1: 3xlarge 6xlarge 24xlarge
x1: 16xlarge 32xlarge
x1e: xlarge 2xlarge 4xlarge 8xlarge 16xlarge 32xlarge
x2iezn: 2xlarge 4xlarge 6xlarge 8xlarge 12xlarge metal
x2idn: 16xlarge 24xlarge 32xlarge metal
x2iedn: xlarge 2xlarge 4xlarge 8xlarge 16xlarge 24xlarge 32xlarge metal
i4i: large xlarge 2xlarge 4xlarge 8xlarge 16xlarge 32xlarge metal 12xlarge 24xlarge
u-3tb1: 56xlarge
trn1: 2xlarge 32xlarge
hpc6id trn1n: 32xlarge
inf2: xlarge 8xlarge 24xlarge 48xlarge
p5: 48xlarge 4xlarge
m7i c7i r7i i7i: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 48xlarge
 metal-24xl metal-48xl
m7i-flex c7i-flex r8i-flex m8i-flex c8i-flex: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge
 16xlarge
m7a r7a c7a: medium large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 32xlarge
 48xlarge metal-48xl
hpc7a: 12xlarge 24xlarge 48xlarge 96xlarge
r7iz: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 32xlarge metal-16xl metal-32xl
gr6: 4xlarge 8xlarge
u7i-12tb u7in-16tb u7in-24tb u7in-32tb u7ib-12tb: 224xlarge
r8g c8g m8g x8g c8gd m8gd r8gd c8gn r8gn m8a r8a c8a: medium large xlarge 2xlarge 4xlarge 8xlarge
 12xlarge 16xlarge 24xlarge 48xlarge metal-24xl metal-48xl
i7ie i8ge: large xlarge 2xlarge 3xlarge 6xlarge 12xlarge 18xlarge 24xlarge 48xlarge metal-24xl
 metal-48xl
i8g: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge metal-24xl 48xlarge
 metal-48xl
u7i-6tb u7i-8tb: 112xlarge
u7inh-32tb: 480xlarge
f2: 12xlarge 48xlarge 6xlarge
trn2: 48xlarge 3xlarge
p6e-gb200: 36xlarge
g6f: large xlarge 2xlarge 4xlarge
r8i m8i c8i r8id c8id m8id c8in c8ib r8in r8ib m8in m8ib m8idn r8idn m8idb r8idb: large xlarge
 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 32xlarge 48xlarge 96xlarge metal-48xl
 metal-96xl
r8gb: medium large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge metal-24xl 48xlarge
 metal-48xl
c8gb: 12xlarge 16xlarge 24xlarge 2xlarge 4xlarge 8xlarge large medium metal-24xl xlarge 48xlarge
 metal-48xl
m8gb: 12xlarge 16xlarge 24xlarge 2xlarge 4xlarge 8xlarge large medium xlarge 48xlarge metal-24xl
 metal-48xl
m8gn: 12xlarge 16xlarge 24xlarge 2xlarge 48xlarge 4xlarge 8xlarge large medium xlarge metal-24xl
 metal-48xl
x8aedz: 12xlarge 24xlarge 3xlarge 6xlarge large metal-12xl metal-24xl xlarge
m8azn: medium large xlarge 3xlarge 6xlarge 12xlarge 24xlarge metal-12xl metal-24xl
x8i: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 32xlarge 48xlarge 64xlarge
 96xlarge metal-48xl metal-96xl
g7e g7: 2xlarge 4xlarge 8xlarge 12xlarge 24xlarge 48xlarge
hpc8a: 96xlarge
m8ine c8ine: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge
m9g m9gd: large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 48xlarge metal-24xl
 metal-48xl medium
c9g c9gd r9g r9gd: medium large xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge
 48xlarge metal-48xl
t8i: nano micro small medium
"""


def _instance_types() -> frozenset[str]:
    names = []
    for line in _SIZES_OF_FAMILIES.replace("\n ", " ").strip().splitlines():
        families, sizes = line.split(": ")
        names += [f"{family}.{size}" for family in families.split() for size in sizes.split()]
    return frozenset(names)


INSTANCE_TYPES = _instance_types()

_KEYS = """
.: AdditionalInfo BlockDeviceMappings CapacityReservationSpecification ClientToken CpuOptions
 CreditSpecification DisableApiStop DisableApiTermination DryRun EbsOptimized
 ElasticGpuSpecification ElasticInferenceAccelerators EnablePrimaryIpv6 EnclaveOptions
 HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior
 InstanceMarketOptions InstanceType Ipv6AddressCount Ipv6Addresses KernelId KeyName
 LaunchTemplate LicenseSpecifications MaintenanceOptions MaxCount MetadataOptions MinCount
 Monitoring NetworkInterfaces NetworkPerformanceOptions Operator Placement PrivateDnsNameOptions
 PrivateIpAddress RamdiskId SecondaryInterfaces SecurityGroupIds SecurityGroups SubnetId
 TagSpecifications UserData
BlockDeviceMappings: DeviceName Ebs NoDevice VirtualName
BlockDeviceMappings.Ebs: AvailabilityZone AvailabilityZoneId DeleteOnTermination EbsCardIndex
 Encrypted Iops KmsKeyId OutpostArn SnapshotId Throughput VolumeInitializationRate VolumeSize
 VolumeType
CapacityReservationSpecification: CapacityReservationPreference CapacityReservationTarget
CapacityReservationSpecification.CapacityReservationTarget: CapacityReservationId
 CapacityReservationResourceGroupArn
CpuOptions: AmdSevSnp CoreCount NestedVirtualization ThreadsPerCore
CreditSpecification: CpuCredits
ElasticGpuSpecification: Type
ElasticInferenceAccelerators: Count Type
EnclaveOptions: Enabled
HibernationOptions: Configured
IamInstanceProfile: Arn Name
InstanceMarketOptions: MarketType SpotOptions
InstanceMarketOptions.SpotOptions: BlockDurationMinutes InstanceInterruptionBehavior MaxPrice
 SpotInstanceType ValidUntil
Ipv6Addresses: Ipv6Address IsPrimaryIpv6
LaunchTemplate: LaunchTemplateId LaunchTemplateName Version
LicenseSpecifications: LicenseConfigurationArn
MaintenanceOptions: AutoRecovery
MetadataOptions: HttpEndpoint HttpProtocolIpv6 HttpPutResponseHopLimit HttpTokens
 InstanceMetadataTags
Monitoring: Enabled
NetworkInterfaces: AssociateCarrierIpAddress AssociatePublicIpAddress
 ConnectionTrackingSpecification DeleteOnTermination Description DeviceIndex EnaQueueCount
 EnaSrdSpecification Groups InterfaceType Ipv4PrefixCount Ipv4Prefixes Ipv6AddressCount
 Ipv6Addresses Ipv6PrefixCount Ipv6Prefixes NetworkCardIndex NetworkInterfaceId PrimaryIpv6
 PrivateIpAddress PrivateIpAddresses SecondaryPrivateIpAddressCount SubnetId
NetworkInterfaces.ConnectionTrackingSpecification: TcpEstablishedTimeout UdpStreamTimeout
 UdpTimeout
NetworkInterfaces.EnaSrdSpecification: EnaSrdEnabled EnaSrdUdpSpecification
NetworkInterfaces.EnaSrdSpecification.EnaSrdUdpSpecification: EnaSrdUdpEnabled
NetworkInterfaces.Ipv4Prefixes: Ipv4Prefix
NetworkInterfaces.Ipv6Addresses: Ipv6Address IsPrimaryIpv6
NetworkInterfaces.Ipv6Prefixes: Ipv6Prefix
NetworkInterfaces.PrivateIpAddresses: Primary PrivateIpAddress
NetworkPerformanceOptions: BandwidthWeighting
Operator: Principal
Placement: Affinity AvailabilityZone AvailabilityZoneId GroupId GroupName HostId
 HostResourceGroupArn PartitionNumber SpreadDomain Tenancy
PrivateDnsNameOptions: EnableResourceNameDnsAAAARecord EnableResourceNameDnsARecord HostnameType
SecondaryInterfaces: DeleteOnTermination DeviceIndex InterfaceType NetworkCardIndex
 PrivateIpAddressCount PrivateIpAddresses SecondarySubnetId
SecondaryInterfaces.PrivateIpAddresses: PrivateIpAddress
TagSpecifications: ResourceType Tags
TagSpecifications.Tags: Key Value
"""


def _run_instances_keys() -> dict[str, frozenset[str]]:
    lines = _KEYS.replace("\n ", " ").strip().splitlines()
    split = (line.split(": ") for line in lines)
    return {path.strip("."): frozenset(names.split()) for path, names in split}


RUN_INSTANCES_KEYS = _run_instances_keys()
"""Dotted path in a RunInstances request ("" is its top) → the keys there; lists add no level."""
