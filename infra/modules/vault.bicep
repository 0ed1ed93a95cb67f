metadata description = 'The key vault that a Batch account in user-subscription mode must have. Tokenmill puts nothing into it.'

@description('Name of the vault: 3 to 24 letters, digits and hyphens, unique in Azure.')
@minLength(3)
@maxLength(24)
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Object id, in your tenant, of the service principal "Microsoft Azure Batch".')
param batchServiceObjectId string

@description('How long deleted entries can be brought back, in days.')
@minValue(7)
@maxValue(90)
param softDeleteDays int

@description('The Log Analytics workspace.')
param workspaceId string

// Key Vault Secrets Officer. Batch keeps there what its own deployments of nodes need; Batch's documentation asks for get, list,
// set and delete of secrets, and no built-in role gives less.
var secretsOfficer = 'b86a8fe4-44ce-4948-aee5-eccb2c155cd7'

resource vault 'Microsoft.KeyVault/vaults@2023-07-01' = {
  name: name
  location: location
  tags: tags
  properties: {
    tenantId: tenant().tenantId
    sku: {
      family: 'A'
      name: 'standard'
    }
    enableRbacAuthorization: true
    enabledForDeployment: true // both asked for by Batch, which deploys nodes out of this subscription
    enabledForTemplateDeployment: true
    enableSoftDelete: true
    enablePurgeProtection: true
    softDeleteRetentionInDays: softDeleteDays
    publicNetworkAccess: 'Disabled'
    networkAcls: {
      bypass: 'AzureServices' // Batch is one of the trusted services, and comes this way
      defaultAction: 'Deny'
      ipRules: []
      virtualNetworkRules: []
    }
  }
}

resource batchRole 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: vault
  name: guid(vault.id, batchServiceObjectId, secretsOfficer)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', secretsOfficer)
    principalId: batchServiceObjectId
    principalType: 'ServicePrincipal'
  }
}

resource diagnostics 'Microsoft.Insights/diagnosticSettings@2021-05-01-preview' = {
  scope: vault
  name: 'tokenmill'
  properties: {
    workspaceId: workspaceId
    logs: [
      {
        categoryGroup: 'audit'
        enabled: true
      }
    ]
  }
}

@description('The vault.')
output vaultId string = vault.id

@description('Its address.')
output vaultUri string = vault.properties.vaultUri
