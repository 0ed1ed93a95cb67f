metadata description = 'Everything that Tokenmill needs in Azure, in one resource group. README.md beside this file has the commands, in order.'

targetScope = 'resourceGroup'

@description('Beginning of every name: 2 to 8 lower-case letters and digits.')
@minLength(2)
@maxLength(8)
param namePrefix string

@description('Which environment this is; part of every name.')
@allowed([
  'dev'
  'prod'
])
param environmentName string

@description('Azure region. It must have the ND size, and quota for it; README.md says how to look.')
param location string = resourceGroup().location

@description('Tags of every resource, for bills and policies.')
param tags object = {}

@description('The size of the GPU nodes. All but the two ARM64 ones go into a Batch pool; those into a scale set.')
@allowed([
  'Standard_ND96asr_v4'
  'Standard_ND96amsr_A100_v4'
  'Standard_ND96isr_H100_v5'
  'Standard_ND96isr_H200_v5'
  'Standard_ND96isr_MI300X_v5'
  'Standard_ND128isr_NDR_GB200_v6'
  'Standard_ND128isr_GB300_v6'
])
param workerSize string

@description('Most GPU nodes at once. This is the bill\'s upper bound, together with the hours.')
@minValue(1)
@maxValue(1000)
param maxWorkers int

@description('Whether GPU nodes of the Batch pool are spot ones. They may be taken away at any time; no finished row is lost.')
param spotWorkers bool

@description('The size of the driver nodes: small, on demand, without GPU. Its local disk takes a copy of each model that jobs on it use, since a driver reads the weights once for their digests.')
param driverSize string = 'Standard_D8ds_v5'

@description('Most driver nodes at once; each runs the drivers of up to four jobs.')
@minValue(1)
@maxValue(100)
param maxDriverNodes int = 2

@description('Driver nodes that stay when there is no job, so that a job starts some ten minutes sooner.')
@minValue(0)
@maxValue(100)
param warmDriverNodes int = 0

@description('Ubuntu of the x86-64 nodes, as Microsoft\'s HPC image has it. MI300X takes the one with ROCm by itself.')
@allowed([
  '2204'
  '2404'
])
param ubuntu string = '2204'

@description('Size of every node\'s system disk, which also holds the container image, in GB.')
@minValue(128)
param osDiskGb int = 256

@description('Tag of the worker image in the registry. Build and push it before the first job.')
param imageTag string

@description('Address ranges, as in 203.0.113.7 or 198.51.100.0/24, from which operators reach storage, registry and Batch. Empty: only from the network, by peering or VPN.')
param operatorAddressRanges array = []

@description('Object id of the user or group that submits jobs and uploads data; empty for none.')
param operatorObjectId string = ''

@description('What operatorObjectId is.')
@allowed([
  'User'
  'Group'
])
param operatorType string = 'Group'

@description('Object id, in your tenant, of the service principal "Microsoft Azure Batch"; README.md has the command that prints it.')
@minLength(36)
@maxLength(36)
param batchServiceObjectId string

@description('Whether to let Batch create nodes in this subscription. Once per subscription; false where somebody has done it before.')
param grantBatchRole bool = true

@description('Whether nodes may open connections to the internet, through a NAT gateway. Nothing here needs it.')
param outboundInternet bool = false

@description('Range of the network.')
param addressPrefix string = '10.40.0.0/16'

@description('Range of the drivers.')
param driverPrefix string = '10.40.0.0/24'

@description('Range of the private endpoints.')
param endpointPrefix string = '10.40.1.0/24'

@description('Range of the workers: 1019 nodes.')
param workerPrefix string = '10.40.4.0/22'

@description('Replication of the storage account.')
@allowed([
  'Standard_LRS'
  'Standard_ZRS'
])
param storageSku string = 'Standard_ZRS'

@description('How long deleted or overwritten data can be brought back, in days.')
@minValue(7)
@maxValue(90)
param undeleteDays int = 14

@description('How long logs are kept, in days.')
@minValue(30)
@maxValue(730)
param logRetentionDays int = 90

@description('Most logs taken in on one day, in GB.')
@minValue(1)
param logDailyCapGb int = 5

@description('The nodes\' fast local disk; the start task makes it, weights are kept there.')
param scratch string = '/mnt/tokenmill'

@description('GB200 and GB300 only: how many nodes the scale set has now.')
@minValue(0)
@maxValue(100)
param scaleSetNodes int = 0

@description('GB200 and GB300 only: public half of an SSH key, which a Linux scale set must have.')
param sshPublicKey string = ''

@description('GB200 and GB300 only: the model that the scale set\'s workers load, as in az://models/llama-3.3-70b.')
param scaleSetModel string = 'az://models/llama'

var name = '${namePrefix}-${environmentName}'
// Names that must be unique in Azure and take no hyphens.
var unique = '${namePrefix}${environmentName}${take(uniqueString(resourceGroup().id), 8)}'
var arm64 = contains(workerSize, '_GB')
var scaleSetRendezvous = 'az://output/cluster'
// A container of its own: operators write it, and are not to read those keys of jobs that drivers put into the other one.
var scaleSetKeys = 'az://cluster-keys/scale-set'
var operatorContainers = concat(['input', 'output', 'models'], arm64 ? ['cluster-keys'] : [])
var allTags = union(tags, { application: 'tokenmill', environment: environmentName })

module logs 'modules/logs.bicep' = {
  name: 'logs'
  params: {
    name: '${name}-logs'
    location: location
    tags: allTags
    retentionDays: logRetentionDays
    dailyCapGb: logDailyCapGb
  }
}

module network 'modules/network.bicep' = {
  name: 'network'
  params: {
    name: name
    location: location
    tags: allTags
    addressPrefix: addressPrefix
    driverPrefix: driverPrefix
    workerPrefix: workerPrefix
    endpointPrefix: endpointPrefix
    outboundInternet: outboundInternet
  }
}

module storage 'modules/storage.bicep' = {
  name: 'storage'
  params: {
    name: unique
    location: location
    tags: allTags
    sku: storageSku
    operatorAddressRanges: operatorAddressRanges
    undeleteDays: undeleteDays
    clusterKeys: arm64
    workspaceId: logs.outputs.workspaceId
  }
}

module registry 'modules/registry.bicep' = {
  name: 'registry'
  params: {
    name: unique
    location: location
    tags: allTags
    operatorAddressRanges: operatorAddressRanges
    workspaceId: logs.outputs.workspaceId
  }
}

module vault 'modules/vault.bicep' = {
  name: 'vault'
  params: {
    name: unique
    location: location
    tags: allTags
    batchServiceObjectId: batchServiceObjectId
    softDeleteDays: undeleteDays
    workspaceId: logs.outputs.workspaceId
  }
}

module subscriptionRole 'modules/subscription-role.bicep' = if (grantBatchRole) {
  name: 'subscription-role'
  scope: subscription()
  params: {
    batchServiceObjectId: batchServiceObjectId
  }
}

module batch 'modules/batch-account.bicep' = {
  name: 'batch-account'
  dependsOn: [
    subscriptionRole
  ]
  params: {
    name: unique
    location: location
    tags: allTags
    vaultId: vault.outputs.vaultId
    vaultUri: vault.outputs.vaultUri
    operatorAddressRanges: operatorAddressRanges
    workspaceId: logs.outputs.workspaceId
  }
}

module links 'modules/private-links.bicep' = {
  name: 'private-links'
  params: {
    name: name
    location: location
    tags: allTags
    networkId: network.outputs.networkId
    subnetId: network.outputs.endpointSubnetId
    storageId: storage.outputs.accountId
    registryId: registry.outputs.registryId
    batchId: batch.outputs.accountId
  }
}

module nodeIdentity 'modules/identity.bicep' = {
  name: 'identity-nodes'
  params: {
    name: '${name}-nodes'
    location: location
    tags: allTags
  }
}

module nodeRoles 'modules/roles.bicep' = {
  name: 'roles-nodes'
  params: {
    principalId: nodeIdentity.outputs.principalId
    principalType: 'ServicePrincipal'
    storageName: storage.outputs.accountName
    readable: ['input', 'models']
    writable: ['output', 'keys']
    registryName: registry.outputs.registryName
    push: false
    batchName: batch.outputs.accountName
  }
}

module operatorRoles 'modules/roles.bicep' = if (!empty(operatorObjectId)) {
  name: 'roles-operators'
  params: {
    principalId: operatorObjectId
    principalType: operatorType
    storageName: storage.outputs.accountName
    readable: []
    writable: operatorContainers
    registryName: registry.outputs.registryName
    push: true
    batchName: batch.outputs.accountName
  }
}

var image = '${registry.outputs.loginServer}/tokenmill:${imageTag}'

module drivers 'modules/pool.bicep' = {
  name: 'pool-drivers'
  dependsOn: [
    links
    nodeRoles
  ]
  params: {
    accountName: batch.outputs.accountName
    name: 'drivers'
    vmSize: driverSize
    maxNodes: maxDriverNodes
    minNodes: warmDriverNodes
    taskSlots: 4
    spot: false
    ubuntu: ubuntu
    osDiskGb: osDiskGb
    subnetId: network.outputs.driverSubnetId
    identityId: nodeIdentity.outputs.identityId
    registryServer: registry.outputs.loginServer
    image: image
    scratch: scratch
  }
}

module workers 'modules/pool.bicep' = if (!arm64) {
  name: 'pool-workers'
  dependsOn: [
    links
    nodeRoles
  ]
  params: {
    accountName: batch.outputs.accountName
    name: 'workers'
    vmSize: workerSize
    maxNodes: maxWorkers
    minNodes: 0
    taskSlots: 1
    spot: spotWorkers
    ubuntu: contains(workerSize, 'MI300X') ? '2204-rocm' : ubuntu
    osDiskGb: osDiskGb
    subnetId: network.outputs.workerSubnetId
    identityId: nodeIdentity.outputs.identityId
    registryServer: registry.outputs.loginServer
    image: image
    scratch: scratch
  }
}

module scaleSet 'modules/scale-set-cluster.bicep' = if (arm64) {
  name: 'scale-set-cluster'
  dependsOn: [
    links
  ]
  params: {
    name: name
    scaleSetName: '${namePrefix}gb'
    location: location
    tags: allTags
    vmSize: workerSize
    nodes: scaleSetNodes
    osDiskGb: osDiskGb
    subnetId: network.outputs.workerSubnetId
    sshPublicKey: sshPublicKey
    registryName: registry.outputs.registryName
    registryServer: registry.outputs.loginServer
    image: image
    storageName: storage.outputs.accountName
    model: scaleSetModel
    rendezvous: scaleSetRendezvous
    keys: scaleSetKeys
  }
}

var scaleSetCluster = {
  kind: 'address'
  rendezvous: scaleSetRendezvous
  keys: './keys' // a folder on the machine that runs scheduler and job; the nodes fetch the same keys from scaleSetKeys
}

var batchCluster = {
  kind: 'azure-batch'
  endpoint: batch.outputs.endpoint
  driver_pool: drivers.outputs.poolName
  worker_pool: 'workers'
  nodes: maxWorkers
  image: image
  identity: nodeIdentity.outputs.identityId
  client_id: nodeIdentity.outputs.clientId
  keys: 'az://keys/jobs'
  scratch: scratch
}

@description('The cluster section of a job file, whole. `az deployment group show` prints it as YAML.')
output cluster object = arm64 ? scaleSetCluster : batchCluster

@description('The storage section of a job file, whole.')
output storage object = {
  account_name: storage.outputs.accountName
  credential: {
    kind: 'default' // who is signed in on the submitter's machine; on nodes their identity, which their tasks name
  }
}

@description('Where to push the image.')
output registryServer string = registry.outputs.loginServer

@description('The scale set, where the size is one of the two ARM64 ones.')
output scaleSetName string = arm64 ? '${namePrefix}gb' : ''
