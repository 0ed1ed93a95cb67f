metadata description = 'A Batch pool: drivers on a small size, or workers on ND nodes. No address on the internet, no password, zero nodes while there is no work.'

@description('The Batch account.')
param accountName string

@description('Name of the pool.')
param name string

@description('Azure size of a node.')
param vmSize string

@description('Most nodes at once.')
@minValue(1)
@maxValue(1000)
param maxNodes int

@description('Nodes that stay when there is no work. They cost, and save the minutes that a node takes to come up.')
@minValue(0)
param minNodes int

@description('Tasks that run on a node at once. A worker takes a whole node; drivers are small.')
@minValue(1)
@maxValue(256)
param taskSlots int

@description('Whether nodes are spot ones: cheaper, and taken away with 30 seconds\' notice. Drivers must not be.')
param spot bool

@description('Ubuntu of the node, as Microsoft\'s HPC image has it. The node agent follows from it.')
@allowed([
  '2204'
  '2404'
  '2204-rocm'
])
param ubuntu string

@description('Size of the operating system\'s disk, which also holds the container image, in GB.')
@minValue(128)
param osDiskGb int

@description('The subnet of the nodes.')
param subnetId string

@description('The identity of the nodes: pulls the image, and what their tasks may do.')
param identityId string

@description('Host name of the registry.')
param registryServer string

@description('The container image, with registry and tag.')
param image string

@description('The nodes\' fast local disk, which the start task makes out of whatever disks the size has.')
param scratch string

var nodeAgents = {
  '2204': 'batch.node.ubuntu 22.04'
  '2404': 'batch.node.ubuntu 24.04'
  '2204-rocm': 'batch.node.ubuntu 22.04'
}

var registry = {
  registryServer: registryServer
  identityReference: {
    resourceId: identityId
  }
}

// Tasks that wait or run, over the slots of a node, are the nodes that are wanted. The mean keeps a node that has just run out of
// work for one more look; without enough samples (a new pool, or Batch was busy) the last one decides. taskcompletion: never pull
// a node from under a task.
var wanted = '$samples = $PendingTasks.GetSamplePercent(TimeInterval_Minute * 10); $tasks = $samples < 70 ? max(0, $PendingTasks.GetSample(1)) : max($PendingTasks.GetSample(1), avg($PendingTasks.GetSample(TimeInterval_Minute * 10)));'
var target = spot ? '$TargetLowPriorityNodes' : '$TargetDedicatedNodes'
var formula = '${wanted} ${target} = min(${maxNodes}, max(${minNodes}, ($tasks + ${taskSlots - 1}) / ${taskSlots})); $NodeDeallocationOption = taskcompletion;'

var startTask = {
  commandLine: 'tokenmill node-start ${scratch}'
  containerSettings: {
    imageName: image
    registry: registry
    // Root on the host (elevationLevel below), once, before any task: joins raw disks to one and mounts it. rshared: what it mounts
    // is seen by the host.
    containerRunOptions: '--privileged --network host --volume /mnt:/mnt:rshared --volume /dev:/dev'
    workingDirectory: 'TaskWorkingDirectory'
  }
  userIdentity: {
    autoUser: {
      scope: 'Pool'
      elevationLevel: 'Admin'
    }
  }
  maxTaskRetryCount: 3
  waitForSuccess: true
}

resource account 'Microsoft.Batch/batchAccounts@2025-06-01' existing = {
  name: accountName
}

resource pool 'Microsoft.Batch/batchAccounts/pools@2025-06-01' = {
  parent: account
  name: name
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: {
      '${identityId}': {}
    }
  }
  properties: {
    vmSize: vmSize
    taskSlotsPerNode: taskSlots
    taskSchedulingPolicy: {
      nodeFillType: 'Spread'
    }
    interNodeCommunication: 'Disabled' // workers never talk to each other; enabled, a pool no longer shrinks by itself
    scaleSettings: {
      autoScale: {
        formula: formula
        evaluationInterval: 'PT5M'
      }
    }
    deploymentConfiguration: {
      virtualMachineConfiguration: {
        imageReference: {
          publisher: 'microsoft-dsvm'
          offer: 'ubuntu-hpc'
          sku: ubuntu
          version: 'latest'
        }
        nodeAgentSkuId: nodeAgents[ubuntu]
        osDisk: {
          caching: 'ReadOnly'
          diskSizeGB: osDiskGb
          managedDisk: {
            storageAccountType: 'Premium_LRS'
          }
        }
        containerConfiguration: {
          type: 'DockerCompatible'
          containerImageNames: [
            image
          ]
          containerRegistries: [
            registry
          ]
        }
        nodePlacementConfiguration: {
          policy: 'Regional'
        }
      }
    }
    networkConfiguration: {
      subnetId: subnetId
      publicIPAddressConfiguration: {
        provision: 'NoPublicIPAddresses'
      }
    }
    startTask: startTask
  }
}

@description('Name of the pool, for the job file.')
output poolName string = pool.name
