metadata description = 'Private endpoints of storage, registry and Batch, and the DNS zones that lead to them.'

@description('Beginning of every name.')
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('The network.')
param networkId string

@description('The subnet that addresses are taken from.')
param subnetId string

@description('The storage account.')
param storageId string

@description('The registry.')
param registryId string

@description('The Batch account.')
param batchId string

var zones = {
  storage: 'privatelink.blob.${environment().suffixes.storage}'
  registry: 'privatelink${environment().suffixes.acrLoginServer}'
  batch: 'privatelink.batch.azure.com'
}

module storageZone 'dns-zone.bicep' = {
  name: 'dns-storage'
  params: {
    zone: zones.storage
    networkId: networkId
    tags: tags
  }
}

module registryZone 'dns-zone.bicep' = {
  name: 'dns-registry'
  params: {
    zone: zones.registry
    networkId: networkId
    tags: tags
  }
}

module batchZone 'dns-zone.bicep' = {
  name: 'dns-batch'
  params: {
    zone: zones.batch
    networkId: networkId
    tags: tags
  }
}

module storageEndpoint 'private-endpoint.bicep' = {
  name: 'endpoint-storage'
  params: {
    name: '${name}-storage-endpoint'
    location: location
    tags: tags
    serviceId: storageId
    part: 'blob'
    subnetId: subnetId
    zoneId: storageZone.outputs.zoneId
  }
}

module registryEndpoint 'private-endpoint.bicep' = {
  name: 'endpoint-registry'
  params: {
    name: '${name}-registry-endpoint'
    location: location
    tags: tags
    serviceId: registryId
    part: 'registry'
    subnetId: subnetId
    zoneId: registryZone.outputs.zoneId
  }
}

// Drivers create jobs through this one.
module accountEndpoint 'private-endpoint.bicep' = {
  name: 'endpoint-batch'
  params: {
    name: '${name}-batch-endpoint'
    location: location
    tags: tags
    serviceId: batchId
    part: 'batchAccount'
    subnetId: subnetId
    zoneId: batchZone.outputs.zoneId
  }
}

// Nodes report to Batch through this one; without it and without outbound internet they would count as unusable.
module nodeEndpoint 'private-endpoint.bicep' = {
  name: 'endpoint-nodes'
  dependsOn: [
    accountEndpoint // both write into one DNS zone, and Azure refuses to do that at once
  ]
  params: {
    name: '${name}-nodes-endpoint'
    location: location
    tags: tags
    serviceId: batchId
    part: 'nodeManagement'
    subnetId: subnetId
    zoneId: batchZone.outputs.zoneId
  }
}
