metadata description = 'The Batch account. Nodes are made in this subscription, which is what spot prices and new ND sizes ask for.'

@description('Name of the account: 3 to 24 lower-case letters and digits, unique in its region.')
@minLength(3)
@maxLength(24)
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('The key vault that user-subscription mode asks for.')
param vaultId string

@description('Its address.')
param vaultUri string

@description('Address ranges of operators who may submit without the network. Empty: nobody, only through the private endpoint.')
param operatorAddressRanges array

@description('The Log Analytics workspace.')
param workspaceId string

// A variable of its own: Bicep takes a loop as a variable's whole value, and not inside an object of one.
var operatorRules = [
  for addresses in operatorAddressRanges: {
    value: addresses
    action: 'Allow'
  }
]

var operatorsOnly = {
  accountAccess: {
    defaultAction: 'Deny'
    ipRules: operatorRules
  }
  nodeManagementAccess: {
    defaultAction: 'Deny' // nodes come through their private endpoint
    ipRules: []
  }
}

resource account 'Microsoft.Batch/batchAccounts@2025-06-01' = {
  name: name
  location: location
  tags: tags
  identity: {
    type: 'None' // it reads nobody's storage: job files and logs travel with the nodes' identity
  }
  properties: {
    allowedAuthenticationModes: [
      'AAD'
    ]
    poolAllocationMode: 'UserSubscription'
    keyVaultReference: {
      id: vaultId
      url: vaultUri
    }
    publicNetworkAccess: empty(operatorAddressRanges) ? 'Disabled' : 'Enabled'
    networkProfile: empty(operatorAddressRanges) ? null : operatorsOnly
  }
}

resource diagnostics 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: account
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

@description('The account.')
output accountId string = account.id

@description('Its name, for pools and roles.')
output accountName string = account.name

@description('Where jobs are submitted.')
output endpoint string = 'https://${account.properties.accountEndpoint}'
