metadata description = 'Lets Batch create nodes in this subscription. Once per subscription; the role is the narrowest that Batch accepts.'

targetScope = 'subscription'

@description('Object id, in your tenant, of the service principal "Microsoft Azure Batch".')
param batchServiceObjectId string

// Azure Batch Service Orchestration Role: virtual machines, scale sets, disks, load balancers and network joins, and nothing else.
// The other role that Batch's documentation names is Contributor, which may change everything in the subscription.
var orchestration = 'a35466a1-cfd6-450a-b35e-683fcdf30363'

resource role 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(subscription().id, batchServiceObjectId, orchestration)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', orchestration)
    principalId: batchServiceObjectId
    principalType: 'ServicePrincipal'
  }
}

@description('The assignment.')
output assignmentId string = role.id
