metadata description = 'Where the services write who did what, and what failed.'

@description('Name of the workspace.')
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('How long entries are kept, in days.')
@minValue(30)
@maxValue(730)
param retentionDays int

@description('Most that is taken in on one day, in GB, so that a loop cannot run up a bill.')
@minValue(1)
param dailyCapGb int

resource workspace 'Microsoft.OperationalInsights/workspaces@2023-09-01' = {
  name: name
  location: location
  tags: tags
  properties: {
    sku: {
      name: 'PerGB2018'
    }
    retentionInDays: retentionDays
    workspaceCapping: {
      dailyQuotaGb: dailyCapGb
    }
    features: {
      disableLocalAuth: true
    }
    // Services write through Azure itself and need no ingestion from outside; reading asks Entra ID for a role, from anywhere.
    publicNetworkAccessForIngestion: 'Disabled'
    publicNetworkAccessForQuery: 'Enabled'
  }
}

@description('The workspace, for diagnostic settings.')
output workspaceId string = workspace.id
