metadata description = 'What GB200 and GB300 nodes need beside the Batch account: an identity of their own, its roles, and the scale set.'

@description('Beginning of every name.')
param name string

@description('Name of the scale set.')
param scaleSetName string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

// Not @allowed: Bicep refuses to pass a parameter of seven sizes to one of two. main.bicep comes here with the two alone.
@description('Azure size of a node, an ARM64 one.')
param vmSize string

@description('How many nodes.')
param nodes int

@description('Size of the system disk, in GB.')
param osDiskGb int

@description('The subnet of the nodes.')
param subnetId string

@description('Public half of an SSH key.')
param sshPublicKey string

@description('The registry\'s name.')
param registryName string

@description('Its host name.')
param registryServer string

@description('The container image, with registry and tag.')
param image string

@description('The storage account.')
param storageName string

@description('The model that the workers load, as a URI.')
param model string

@description('Where the scheduler publishes its address, as a URI.')
param rendezvous string

@description('Where the cluster\'s keys lie, as a URI; operators put them there.')
param keys string

module identity 'identity.bicep' = {
  name: 'identity-scale-set'
  params: {
    name: '${name}-scale-set'
    location: location
    tags: tags
  }
}

// These workers submit nothing and make no keys: no role on Batch, and of keys they read their own cluster's, not those of jobs.
module roles 'roles.bicep' = {
  name: 'roles-scale-set'
  params: {
    principalId: identity.outputs.principalId
    principalType: 'ServicePrincipal'
    storageName: storageName
    readable: [
      'input'
      'models'
      'cluster-keys'
    ]
    writable: [
      'output'
    ]
    registryName: registryName
    push: false
    batchName: ''
  }
}

module scaleSet 'scale-set.bicep' = {
  name: 'scale-set'
  dependsOn: [
    roles
  ]
  params: {
    name: scaleSetName
    location: location
    tags: tags
    vmSize: vmSize
    nodes: nodes
    osDiskGb: osDiskGb
    subnetId: subnetId
    identityId: identity.outputs.identityId
    clientId: identity.outputs.clientId
    sshPublicKey: sshPublicKey
    registryServer: registryServer
    image: image
    storageName: storageName
    model: model
    rendezvous: rendezvous
    keys: keys
  }
}
