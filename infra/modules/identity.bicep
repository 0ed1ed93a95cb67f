metadata description = 'An identity for machines: no password, no key, nothing to rotate.'

@description('Name of the identity.')
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: name
  location: location
  tags: tags
}

@description('What a pool or a scale set is given.')
output identityId string = identity.id

@description('What roles are assigned to.')
output principalId string = identity.properties.principalId

@description('What a process on a node asks for tokens by.')
output clientId string = identity.properties.clientId
