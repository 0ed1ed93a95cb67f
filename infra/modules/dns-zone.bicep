metadata description = 'A private DNS zone, linked to the network, in which private endpoints register their addresses.'

@description('Name of the zone, as the service prescribes it.')
param zone string

@description('The network whose machines ask this zone.')
param networkId string

@description('Tags of every resource.')
param tags object

resource dnsZone 'Microsoft.Network/privateDnsZones@2024-06-01' = {
  name: zone
  location: 'global'
  tags: tags
}

resource link 'Microsoft.Network/privateDnsZones/virtualNetworkLinks@2024-06-01' = {
  parent: dnsZone
  name: 'tokenmill'
  location: 'global'
  tags: tags
  properties: {
    registrationEnabled: false
    virtualNetwork: {
      id: networkId
    }
  }
}

@description('The zone.')
output zoneId string = dnsZone.id
