metadata description = 'The container registry of the worker image. Premium, because private endpoints ask for it.'

@description('Name of the registry: 5 to 50 letters and digits, unique in Azure.')
@minLength(5)
@maxLength(50)
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Address ranges of operators who may push without the network. Empty: nobody.')
param operatorAddressRanges array

@description('The Log Analytics workspace.')
param workspaceId string

resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    name: 'Premium'
  }
  properties: {
    adminUserEnabled: false
    anonymousPullEnabled: false
    dataEndpointEnabled: true
    networkRuleBypassOptions: 'None'
    publicNetworkAccess: empty(operatorAddressRanges) ? 'Disabled' : 'Enabled'
    networkRuleSet: {
      defaultAction: 'Deny'
      ipRules: [
        for addresses in operatorAddressRanges: {
          value: addresses
          action: 'Allow'
        }
      ]
    }
  }
}

resource diagnostics 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: registry
  name: 'tokenmill'
  properties: {
    workspaceId: workspaceId
    logs: [
      {
        categoryGroup: 'allLogs'
        enabled: true
      }
    ]
    metrics: [
      {
        category: 'AllMetrics'
        enabled: true
      }
    ]
  }
}

@description('The registry.')
output registryId string = registry.id

@description('Its name, for roles.')
output registryName string = registry.name

@description('What image names begin with.')
output loginServer string = registry.properties.loginServer
