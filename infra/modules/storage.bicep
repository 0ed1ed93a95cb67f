metadata description = 'Tables, completions, weights and the keys of running jobs. Reached by identity and private endpoint alone.'

@description('Name of the account: 3 to 24 lower-case letters and digits, unique in Azure.')
@minLength(3)
@maxLength(24)
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Replication. Zone-redundant outlives a data centre.')
@allowed([
  'Standard_LRS'
  'Standard_ZRS'
])
param sku string

@description('Address ranges of operators who may reach the account without the network. Empty: nobody.')
param operatorAddressRanges array

@description('How long deleted or overwritten data can be brought back, in days.')
@minValue(1)
@maxValue(365)
param undeleteDays int

@description('The Log Analytics workspace.')
param workspaceId string

@description('Whether there is a container for keys that operators make, of a cluster of their own. Those that drivers make lie in keys.')
param clusterKeys bool

var containers = concat(['input', 'output', 'models', 'keys'], clusterKeys ? ['cluster-keys'] : [])

resource account 'Microsoft.Storage/storageAccounts@2024-01-01' = {
  name: name
  location: location
  tags: tags
  kind: 'StorageV2'
  sku: {
    name: sku
  }
  properties: {
    accessTier: 'Hot'
    allowBlobPublicAccess: false
    allowCrossTenantReplication: false
    allowSharedKeyAccess: false
    defaultToOAuthAuthentication: true
    isHnsEnabled: false // versioning needs a flat namespace; az:// and abfss:// URIs work on it all the same
    isLocalUserEnabled: false
    isSftpEnabled: false
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    publicNetworkAccess: empty(operatorAddressRanges) ? 'Disabled' : 'Enabled'
    networkAcls: {
      bypass: 'None'
      defaultAction: 'Deny'
      ipRules: [
        for addresses in operatorAddressRanges: {
          value: addresses
          action: 'Allow'
        }
      ]
      virtualNetworkRules: []
    }
    encryption: {
      keySource: 'Microsoft.Storage'
      requireInfrastructureEncryption: true
      services: {
        blob: {
          enabled: true
          keyType: 'Account'
        }
      }
    }
  }
}

resource blobs 'Microsoft.Storage/storageAccounts/blobServices@2024-01-01' = {
  parent: account
  name: 'default'
  properties: {
    isVersioningEnabled: true
    deleteRetentionPolicy: {
      enabled: true
      days: undeleteDays
    }
    containerDeleteRetentionPolicy: {
      enabled: true
      days: undeleteDays
    }
  }
}

resource blobContainers 'Microsoft.Storage/storageAccounts/blobServices/containers@2024-01-01' = [
  for container in containers: {
    parent: blobs
    name: container
    properties: {
      publicAccess: 'None'
    }
  }
]

resource lifecycle 'Microsoft.Storage/storageAccounts/managementPolicies@2024-01-01' = {
  parent: account
  name: 'default'
  dependsOn: [
    blobs
  ]
  properties: {
    policy: {
      rules: [
        {
          name: 'old-versions'
          enabled: true
          type: 'Lifecycle'
          definition: {
            filters: {
              blobTypes: [
                'blockBlob'
              ]
            }
            actions: {
              version: {
                delete: {
                  daysAfterCreationGreaterThan: undeleteDays
                }
              }
            }
          }
        }
        {
          // Keys are good for one job. A job that died without cleaning up leaves them behind.
          name: 'forgotten-keys'
          enabled: true
          type: 'Lifecycle'
          definition: {
            filters: {
              blobTypes: [
                'blockBlob'
              ]
              prefixMatch: [
                'keys/'
              ]
            }
            actions: {
              baseBlob: {
                delete: {
                  daysAfterModificationGreaterThan: 31
                }
              }
              version: {
                delete: {
                  daysAfterCreationGreaterThan: 1
                }
              }
            }
          }
        }
      ]
    }
  }
}

resource diagnostics 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: blobs
  name: 'tokenmill'
  properties: {
    workspaceId: workspaceId
    logs: [
      // Reads are left out: a job of ten thousand files reads each several times, and Log Analytics takes money by the line.
      {
        category: 'StorageWrite'
        enabled: true
      }
      {
        category: 'StorageDelete'
        enabled: true
      }
    ]
    metrics: [
      {
        category: 'Transaction'
        enabled: true
      }
    ]
  }
}

@description('The account.')
output accountId string = account.id

@description('Its name, for roles and for the job file\'s storage section.')
output accountName string = account.name
