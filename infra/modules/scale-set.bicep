metadata description = 'GB200 and GB300 nodes (ARM64), which Azure Batch is not known to have: a scale set whose machines run the same worker image.'

@description('Name of the scale set.')
@maxLength(64)
param name string

@description('Azure region.')
param location string

@description('Tags of every resource.')
param tags object

@description('Azure size of a node, an ARM64 one.')
param vmSize string

@description('How many nodes. Unlike a Batch pool, a scale set does not shrink by itself: set 0 when the work is done.')
@minValue(0)
@maxValue(100)
param nodes int

@description('Size of the operating system\'s disk, which also holds the container image, in GB.')
@minValue(128)
param osDiskGb int

@description('The subnet of the nodes.')
param subnetId string

@description('The identity of the nodes.')
param identityId string

@description('Its client id, by which processes ask for tokens.')
param clientId string

@description('Public half of an SSH key. A Linux scale set must have one; no rule lets SSH in.')
param sshPublicKey string

@description('Host name of the registry.')
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

// The template's own braces are left alone: only @NAME@ is replaced, so the file is valid cloud-init as it stands.
var identified = replace(loadTextContent('../node/cloud-init.yaml'), '@CLIENT_ID@', clientId)
var pulled = replace(replace(identified, '@REGISTRY@', registryServer), '@IMAGE@', image)
var stored = replace(replace(pulled, '@STORAGE@', storageName), '@MODEL@', model)
var cloudInit = replace(replace(stored, '@RENDEZVOUS@', rendezvous), '@KEYS@', keys)

resource nodeSet 'Microsoft.Compute/virtualMachineScaleSets@2024-07-01' = {
  name: name
  location: location
  tags: tags
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: {
      '${identityId}': {}
    }
  }
  sku: {
    name: vmSize
    tier: 'Standard'
    capacity: nodes
  }
  properties: {
    orchestrationMode: 'Uniform'
    overprovision: false // at these prices no machine is started that is not wanted
    singlePlacementGroup: true // close together; it takes 100 at most
    upgradePolicy: {
      mode: 'Manual' // a new image waits until nodes are replaced on purpose
    }
    virtualMachineProfile: {
      osProfile: {
        computerNamePrefix: take(name, 9) // Azure adds six characters; 15 is the shortest limit that its documentation has
        adminUsername: 'tokenmill'
        customData: base64(cloudInit)
        linuxConfiguration: {
          disablePasswordAuthentication: true
          ssh: {
            publicKeys: [
              {
                path: '/home/tokenmill/.ssh/authorized_keys'
                keyData: sshPublicKey
              }
            ]
          }
        }
      }
      storageProfile: {
        imageReference: {
          publisher: 'microsoft-dsvm'
          offer: 'ubuntu-hpc'
          sku: '2404-gb'
          version: 'latest'
        }
        osDisk: {
          createOption: 'FromImage'
          caching: 'ReadOnly'
          diskSizeGB: osDiskGb
          managedDisk: {
            storageAccountType: 'Premium_LRS'
          }
        }
      }
      networkProfile: {
        networkInterfaceConfigurations: [
          {
            name: 'primary'
            properties: {
              primary: true
              enableAcceleratedNetworking: true
              ipConfigurations: [
                {
                  name: 'inside'
                  properties: {
                    subnet: {
                      id: subnetId
                    }
                  }
                }
              ]
            }
          }
        ]
      }
      scheduledEventsProfile: {
        terminateNotificationProfile: {
          enable: true
          notBeforeTimeout: 'PT5M' // a worker hears of its machine's deletion (Terminate) and hands its rows back
        }
      }
    }
  }
}

@description('Name of the scale set.')
output scaleSetName string = nodeSet.name
