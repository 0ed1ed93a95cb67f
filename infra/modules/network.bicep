metadata description = 'A virtual network that nobody enters from the internet: drivers, workers, and the private endpoints of the services they use.'

@description('Beginning of every name.')
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Address range of the whole network.')
param addressPrefix string

@description('Range of the drivers; they are few.')
param driverPrefix string

@description('Range of the workers; one address per ND node, and Azure keeps five.')
param workerPrefix string

@description('Range of the private endpoints.')
param endpointPrefix string

@description('Whether nodes may open connections to the internet (through a NAT gateway, never the other way round).')
param outboundInternet bool

// Azure lets all of a virtual network's machines talk to each other by default; this ends that, after the rules that allow.
var denyInbound = {
  name: 'deny-all-inbound'
  properties: {
    description: 'Nothing else comes in: not from the internet, not from a neighbour.'
    priority: 4096
    direction: 'Inbound'
    access: 'Deny'
    protocol: '*'
    sourceAddressPrefix: '*'
    sourcePortRange: '*'
    destinationAddressPrefix: '*'
    destinationPortRange: '*'
  }
}

var allowEndpoints = {
  name: 'allow-private-endpoints'
  properties: {
    description: 'Storage, registry, Batch and its node management, all behind private endpoints.'
    priority: 200
    direction: 'Outbound'
    access: 'Allow'
    protocol: 'Tcp'
    sourceAddressPrefix: '*'
    sourcePortRange: '*'
    destinationAddressPrefix: endpointPrefix
    destinationPortRange: '443'
  }
}

// Batch asks for this rule where it checks a subnet. With a private endpoint the name resolves into the network anyway.
var allowBatch = {
  name: 'allow-batch-node-management'
  properties: {
    description: 'The node agent reports to Batch; Batch opens no connection to a node.'
    priority: 210
    direction: 'Outbound'
    access: 'Allow'
    protocol: 'Tcp'
    sourceAddressPrefix: '*'
    sourcePortRange: '*'
    destinationAddressPrefix: 'BatchNodeManagement.${location}'
    destinationPortRange: '443'
  }
}

var internet = {
  name: outboundInternet ? 'allow-internet' : 'deny-internet'
  properties: {
    description: 'Whether a node may reach the internet at all.'
    priority: 4000
    direction: 'Outbound'
    access: outboundInternet ? 'Allow' : 'Deny'
    protocol: '*'
    sourceAddressPrefix: '*'
    sourcePortRange: '*'
    destinationAddressPrefix: 'Internet'
    destinationPortRange: outboundInternet ? '443' : '*'
  }
}

resource driverRules 'Microsoft.Network/networkSecurityGroups@2024-05-01' = {
  name: '${name}-driver-nsg'
  location: location
  tags: tags
  properties: {
    securityRules: [
      {
        name: 'allow-workers'
        properties: {
          description: 'Workers join a scheduler, of which several share a node, each on a port of its own. TLS with the job\'s own CA decides who may.'
          priority: 200
          direction: 'Inbound'
          access: 'Allow'
          protocol: 'Tcp'
          sourceAddressPrefix: workerPrefix
          sourcePortRange: '*'
          destinationAddressPrefix: driverPrefix
          destinationPortRange: '1024-65535'
        }
      }
      denyInbound
      allowEndpoints
      allowBatch
      internet
    ]
  }
}

resource workerRules 'Microsoft.Network/networkSecurityGroups@2024-05-01' = {
  name: '${name}-worker-nsg'
  location: location
  tags: tags
  properties: {
    securityRules: [
      {
        name: 'allow-drivers'
        properties: {
          description: 'A scheduler calls its workers back, on ports that they choose.'
          priority: 200
          direction: 'Inbound'
          access: 'Allow'
          protocol: 'Tcp'
          sourceAddressPrefix: driverPrefix
          sourcePortRange: '*'
          destinationAddressPrefix: workerPrefix
          destinationPortRange: '1024-65535'
        }
      }
      {
        name: 'allow-each-other'
        properties: {
          description: 'Nodes measure the network between them, and hold a model together that one alone does not.'
          priority: 210
          direction: 'Inbound'
          access: 'Allow'
          protocol: 'Tcp'
          sourceAddressPrefix: workerPrefix
          sourcePortRange: '*'
          destinationAddressPrefix: workerPrefix
          destinationPortRange: '1024-65535'
        }
      }
      denyInbound
      allowEndpoints
      allowBatch
      internet
    ]
  }
}

resource endpointRules 'Microsoft.Network/networkSecurityGroups@2024-05-01' = {
  name: '${name}-endpoint-nsg'
  location: location
  tags: tags
  properties: {
    securityRules: [
      {
        name: 'allow-network'
        properties: {
          description: 'Nodes, and whoever is connected to the network by peering or VPN.'
          priority: 200
          direction: 'Inbound'
          access: 'Allow'
          protocol: 'Tcp'
          sourceAddressPrefix: 'VirtualNetwork'
          sourcePortRange: '*'
          destinationAddressPrefix: endpointPrefix
          destinationPortRange: '443'
        }
      }
      denyInbound
    ]
  }
}

resource outboundAddress 'Microsoft.Network/publicIPAddresses@2024-05-01' = if (outboundInternet) {
  name: '${name}-nat-ip'
  location: location
  tags: tags
  sku: {
    name: 'Standard'
  }
  properties: {
    publicIPAllocationMethod: 'Static'
  }
}

resource nat 'Microsoft.Network/natGateways@2024-05-01' = if (outboundInternet) {
  name: '${name}-nat'
  location: location
  tags: tags
  sku: {
    name: 'Standard'
  }
  properties: {
    idleTimeoutInMinutes: 4
    publicIpAddresses: [
      {
        id: outboundAddress.id
      }
    ]
  }
}

// null leaves a property out: a subnet without a gateway has no way to the internet, since defaultOutboundAccess is off, too.
var natReference = outboundInternet ? { id: nat.id } : null

resource network 'Microsoft.Network/virtualNetworks@2024-05-01' = {
  name: '${name}-vnet'
  location: location
  tags: tags
  properties: {
    addressSpace: {
      addressPrefixes: [
        addressPrefix
      ]
    }
    subnets: [
      {
        name: 'drivers'
        properties: {
          addressPrefix: driverPrefix
          defaultOutboundAccess: false
          networkSecurityGroup: {
            id: driverRules.id
          }
          natGateway: natReference
        }
      }
      {
        name: 'workers'
        properties: {
          addressPrefix: workerPrefix
          defaultOutboundAccess: false
          networkSecurityGroup: {
            id: workerRules.id
          }
          natGateway: natReference
        }
      }
      {
        name: 'endpoints'
        properties: {
          addressPrefix: endpointPrefix
          defaultOutboundAccess: false
          networkSecurityGroup: {
            id: endpointRules.id
          }
          privateEndpointNetworkPolicies: 'NetworkSecurityGroupEnabled'
        }
      }
    ]
  }
}

@description('The network, to which private DNS zones are linked.')
output networkId string = network.id

@description('Where drivers run.')
output driverSubnetId string = '${network.id}/subnets/drivers'

@description('Where workers run.')
output workerSubnetId string = '${network.id}/subnets/workers'

@description('Where private endpoints lie.')
output endpointSubnetId string = '${network.id}/subnets/endpoints'
