metadata description = 'What an identity may do: read what it must read, write what it must write, and no more.'

@description('The identity.')
param principalId string

@description('ServicePrincipal for a machine\'s identity, User or Group for people.')
@allowed([
  'ServicePrincipal'
  'User'
  'Group'
])
param principalType string

@description('The storage account.')
param storageName string

@description('Containers that it may read.')
param readable array

@description('Containers that it may read and write.')
param writable array

@description('The registry that it may pull from, or push to; empty for none.')
param registryName string

@description('Whether it may push, too.')
param push bool

@description('The Batch account that it may submit jobs to; empty for none.')
param batchName string

// Storage Blob Data Reader: lists and reads blobs of the container, and can neither change nor delete.
var blobReader = '2a2b9908-6ea1-4ae2-8e65-a410df84e7d1'
// Storage Blob Data Contributor: also creates, changes and deletes blobs of the container. Owner would also change access.
var blobContributor = 'ba92f5b4-2d11-453d-a403-e96b0029c9fe'
// AcrPull: reads images. AcrPush: writes them, too.
var acrPull = '7f951dda-4ed3-4680-a7ca-43fe172d538d'
var acrPush = '8311e382-0749-4cb8-b61a-304f252e45ec'
// Azure Batch Job Submitter: jobs, tasks and schedules. Contributor roles would also change pools and the account.
var jobSubmitter = '48e5e92e-a480-4e71-aa9c-2778f4c13781'

resource storage 'Microsoft.Storage/storageAccounts@2024-01-01' existing = {
  name: storageName
}

resource blobs 'Microsoft.Storage/storageAccounts/blobServices@2024-01-01' existing = {
  parent: storage
  name: 'default'
}

resource readableContainers 'Microsoft.Storage/storageAccounts/blobServices/containers@2024-01-01' existing = [
  for container in readable: {
    parent: blobs
    name: container
  }
]

resource writableContainers 'Microsoft.Storage/storageAccounts/blobServices/containers@2024-01-01' existing = [
  for container in writable: {
    parent: blobs
    name: container
  }
]

resource reads 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for (container, index) in readable: {
    scope: readableContainers[index]
    name: guid(storage.id, container, principalId, blobReader)
    properties: {
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', blobReader)
      principalId: principalId
      principalType: principalType
    }
  }
]

resource writes 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for (container, index) in writable: {
    scope: writableContainers[index]
    name: guid(storage.id, container, principalId, blobContributor)
    properties: {
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', blobContributor)
      principalId: principalId
      principalType: principalType
    }
  }
]

resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' existing = if (!empty(registryName)) {
  name: registryName
}

resource images 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(registryName)) {
  scope: registry
  name: guid(registry.id, principalId, push ? acrPush : acrPull)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', push ? acrPush : acrPull)
    principalId: principalId
    principalType: principalType
  }
}

resource batch 'Microsoft.Batch/batchAccounts@2025-06-01' existing = if (!empty(batchName)) {
  name: batchName
}

resource jobs 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(batchName)) {
  scope: batch
  name: guid(batch.id, principalId, jobSubmitter)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', jobSubmitter)
    principalId: principalId
    principalType: principalType
  }
}
